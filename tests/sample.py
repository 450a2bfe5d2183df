"""Paths of the repository, of the sample model and its bundle (``make models``), and of the pair (``make pair``)."""

from pathlib import Path

PROJECT = Path(__file__).parents[1]
PACKAGES = ["protocol", "common", "export", "device", "basestation", "bench"]
DOCKER = PROJECT / "docker"
SAMPLE = PROJECT / "build" / "sample"
BUNDLE = PROJECT / "build" / "bundle"
PAIR = PROJECT / "build" / "pair"
DEVICE_PYTHON = PROJECT / ".venv-device" / "bin" / "python"
