"""The base station: holds the target model, verifies the drafts of many devices."""

from common.openmp import spin_briefly

spin_briefly()
