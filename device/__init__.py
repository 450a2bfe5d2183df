"""The device: drafts with a small model on ONNX Runtime, and asks the base station.

Knows no torch and no transformers: this folder and ``protocol`` are what a Raspberry Pi gets.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # or else ONNX Runtime reports to its makers that it is used
