"""Bytes that ZeroMQ's wire protocol (ZMTP) adds to a frame in the TCP stream."""

CURVE_BYTES = 33
"""Added by CURVE to each frame: ``\\x07MESSAGE``, a nonce of 8 bytes, a MAC of 16 and one byte of flags (ZMTP RFC 26)."""

_MAX_SHORT_FRAME = 255


def socket_bytes(frame: bytes, envelope_bytes: int = 0) -> int:
    """Bytes of ``frame`` in the TCP stream: with its envelope, one byte of flags and a length of 1 or 8 bytes."""
    size = len(frame) + envelope_bytes
    return size + (2 if size <= _MAX_SHORT_FRAME else 9)
