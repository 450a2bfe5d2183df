"""Paths of the sample model and its bundle, which ``make models`` writes."""

from pathlib import Path

PROJECT = Path(__file__).parents[1]
SAMPLE = PROJECT / "build" / "sample"
BUNDLE = PROJECT / "build" / "bundle"
DEVICE_PYTHON = PROJECT / ".venv-device" / "bin" / "python"
