"""What frames take in the TCP stream."""

_SHORT_FRAME = 255


def socket_bytes(frame: bytes, envelope_bytes: int = 0) -> int:
    """What a frame takes in the TCP stream: ZMTP 3 adds flags and a length of 1 or 8 bytes to it and its envelope."""
    size = len(frame) + envelope_bytes
    return size + (2 if size <= _SHORT_FRAME else 9)
