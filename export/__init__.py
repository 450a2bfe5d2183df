"""Build time only: exports a draft model as an ONNX bundle for the device."""

import os

from common.openmp import spin_briefly

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before ONNX Runtime is imported
spin_briefly()
