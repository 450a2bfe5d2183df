"""Build time only: turns a draft model into an ONNX bundle that a device can load."""
