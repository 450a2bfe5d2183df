"""The device: drafts with a small model on ONNX Runtime; the base station verifies.

Imports no torch and no transformers: this folder, ``common`` and ``protocol`` are what a Raspberry Pi gets.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime would report its use otherwise
