"""The device's end of the link: messages over a DEALER socket, every byte counted.

Knows the socket and the frames; not what a round is. A ``Transport`` moves
frames; the tests put one in memory in its place.
"""

import os
from typing import Protocol

import zmq

from protocol.errors import FrameError, LinkError
from protocol.frames import FrameCodec
from protocol.messages import Message

_LINGER_MS = 500
_HEARTBEAT_MS = 5000
_RECONNECT_MS = 100
_RECONNECT_MAX_MS = 2000
_SHORT_FRAME = 255


class Transport(Protocol):
    """Moves frames between a device and a base station, or loses them."""

    def send(self, frame: bytes) -> None:
        """Send one frame, or lose it."""

    def receive(self, timeout: float) -> bytes | None:
        """The next frame, or None after ``timeout`` seconds."""

    def close(self) -> None:
        """Send what is on its way, and end."""


class SocketTransport:
    """A DEALER socket.

    Its routing id is chosen at random and kept, so that a reconnected socket is
    the same peer to the base station.

    Raises:
        LinkError: ``address`` is no ZeroMQ endpoint.
    """

    def __init__(self, address: str, max_frame_bytes: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.ROUTING_ID, b"\x01" + os.urandom(7)),  # a first byte 0 is reserved
            (zmq.MAXMSGSIZE, max_frame_bytes),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.RECONNECT_IVL, _RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS),
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.LINGER, _LINGER_MS),
        ):
            self._dealer.setsockopt(option, value)
        try:
            self._dealer.connect(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise LinkError(f"{address!r} is no address: {error}; allowed: tcp://HOST:PORT") from error

    def send(self, frame: bytes) -> None:
        """Send one frame; lost where nobody has been reachable for long."""
        try:
            self._dealer.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return  # the request is repeated until its reply is there

    def receive(self, timeout: float) -> bytes | None:
        """The next frame, or None after ``timeout`` seconds."""
        return self._dealer.recv() if self._dealer.poll(max(0, round(timeout * 1000))) else None

    def close(self) -> None:
        """Send what is on its way, and end."""
        self._context.destroy(linger=_LINGER_MS)


class Link:
    """Messages to and from the base station.

    Attributes:
        uplink_bytes: sent so far, as they lie in the TCP stream: frames and ZeroMQ's framing of them.
        downlink_bytes: received so far, likewise.
    """

    def __init__(self, transport: Transport, codec: FrameCodec, address: str) -> None:
        self.address = address
        self.uplink_bytes = 0
        self.downlink_bytes = 0
        self._transport = transport
        self._codec = codec

    @classmethod
    def connect(cls, address: str, codec: FrameCodec) -> "Link":
        """A link over TCP. Nobody needs to be there yet."""
        return cls(SocketTransport(address, codec.max_frame_bytes), codec, address)

    def send(self, message: Message) -> None:
        """Send one message, or lose it."""
        frame = self._codec.encode(message)
        self.uplink_bytes += socket_bytes(frame)
        self._transport.send(frame)

    def receive(self, timeout: float) -> Message | None:
        """The next message, or None after ``timeout`` seconds.

        Raises:
            FrameError: the base station sent something else than a message.
        """
        frame = self._transport.receive(timeout)
        if frame is None:
            return None
        self.downlink_bytes += socket_bytes(frame)
        try:
            return self._codec.decode(frame)
        except FrameError as error:
            raise FrameError(f"{self.address} sent what is no message: {error}") from error

    def close(self) -> None:
        """Send what is on its way, and end."""
        self._transport.close()


def socket_bytes(frame: bytes) -> int:
    """What a frame takes in the TCP stream: ZMTP 3 adds flags and a length of 1 or 8 bytes."""
    return len(frame) + (2 if len(frame) <= _SHORT_FRAME else 9)
