"""Paths of the sample model and its bundle, which ``make models`` writes, and of the pair, which ``make pair`` does."""

from pathlib import Path

PROJECT = Path(__file__).parents[1]
SAMPLE = PROJECT / "build" / "sample"
BUNDLE = PROJECT / "build" / "bundle"
PAIR = PROJECT / "build" / "pair"
DEVICE_PYTHON = PROJECT / ".venv-device" / "bin" / "python"
