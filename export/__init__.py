"""Build time only: turns a draft model into an ONNX bundle that a device can load."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # or else ONNX Runtime reports to its makers that it is used
