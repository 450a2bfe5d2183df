"""Bytes and acceptance of what a Draft carries: modes, encodings, overheads."""
