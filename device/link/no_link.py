"""A device without a base station: answers come from the draft model alone."""

import time

from device.link.link import Link
from protocol.frames import FrameCodec
from protocol.messages import Message


class NoLink(Link):
    """Takes the place of a link where there is none: nothing is sent, nothing arrives, no byte is counted.

    Args:
        reason: why there is none; takes the place of the address in errors.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(_NoTransport(), FrameCodec(1), reason)

    def send(self, message: Message) -> None:
        """Send nothing."""


class _NoTransport:
    """Waits in vain."""

    connections = 0
    device = ""

    def send(self, frame: bytes) -> None:
        raise AssertionError(f"{len(frame)} bytes for no link")

    def receive(self, timeout: float) -> bytes | None:
        time.sleep(timeout)
        return None

    def close(self) -> None:
        pass
