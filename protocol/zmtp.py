"""The size of a frame in the TCP stream, with the overhead of ZeroMQ's wire protocol (ZMTP)."""

from collections.abc import Sized

CURVE_BYTES = 33
"""CURVE overhead per frame: ``\\x07MESSAGE``, an 8-byte nonce, a 16-byte MAC and a flags byte (ZeroMQ RFC 26)."""

_MAX_SHORT_FRAME = 255


def socket_bytes(frame: Sized, envelope_bytes: int = 0) -> int:
    """Bytes of ``frame`` in the TCP stream: with its envelope, a flags byte and a length of 1 or 8 bytes."""
    size = len(frame) + envelope_bytes
    return size + (2 if size <= _MAX_SHORT_FRAME else 9)
