"""Measurements: this system against its alternatives, side by side in one run."""
