"""ZeroMQ's wire protocol (ZMTP 3, ZeroMQ RFC 23): the size of a frame in the TCP stream, and the greeting."""

from collections.abc import Sized

GREETING_BYTES = 64
GREETING_START = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00"
"""Signature and version. Either end sends a greeting before anything else, the rest of it once it has seen this."""
_MECHANISM = slice(12, 32)

CURVE_BYTES = 33
"""CURVE overhead per frame: ``\\x07MESSAGE``, an 8-byte nonce, a 16-byte MAC and a flags byte (ZeroMQ RFC 26)."""

_MAX_SHORT_FRAME = 255


def socket_bytes(frame: Sized, envelope_bytes: int = 0) -> int:
    """Bytes of ``frame`` in the TCP stream: with its envelope, a flags byte and a length of 1 or 8 bytes."""
    size = len(frame) + envelope_bytes
    return size + (2 if size <= _MAX_SHORT_FRAME else 9)


def is_zeromq(greeting: bytes) -> bool:
    """Whether the first bytes of a peer are those of a greeting."""
    return greeting[:1] == GREETING_START[:1]


def mechanism(greeting: bytes) -> str:
    """The security mechanism of a peer, ``NULL`` or ``CURVE``; empty where the greeting ends before it."""
    return greeting[_MECHANISM].rstrip(b"\0").decode("ascii", "replace")
