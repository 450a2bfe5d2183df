"""The base station: holds the target model, verifies the drafts of many devices."""

import os

# OpenMP reads this when PyTorch is loaded. Its idle threads spin for milliseconds by default, which slows
# forward passes by up to ten times where other processes use the same cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
