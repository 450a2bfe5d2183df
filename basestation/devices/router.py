"""The ROUTER socket: whole messages in and frames out, in turns that are bounded in time and bytes."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from basestation.devices.authentication import Authenticator
from protocol.errors import FrameError, LinkError
from protocol.zmtp import CURVE_BYTES, socket_bytes

_LINGER_MS = 500
_HEARTBEAT_MS = 5000
_HANDSHAKE_MS = 5000
"""A connection that has not identified itself by then is closed, so that idle ones do not hold descriptors."""
_QUEUED_BYTES = 64 * 2**20
"""What ZeroMQ queues of what one connection sent, if its messages have the largest size."""
_UNREAD_BYTES = 4 * 2**20
"""What ZeroMQ queues of replies for a connection whose device does not read them, if they have the largest size."""
_MAX_QUEUED_MESSAGES = 1000
_TURN_SECONDS = 0.005
_TURN_BYTES = 4 * 2**20


class Turn:
    """How much is received, or sent, before the other direction has its turn: no peer delays others for long."""

    def __init__(self) -> None:
        self._end = time.monotonic() + _TURN_SECONDS
        self._bytes = _TURN_BYTES

    def spend(self, size: int) -> bool:
        """Count ``size`` bytes; whether anything is left."""
        self._bytes -= size
        return self._bytes > 0 and time.monotonic() < self._end


@dataclass
class ReceivedMessage:
    """A message while its parts are received.

    Only the first part is kept: a message of more is refused, however many there are.

    Attributes:
        address: of the connection.
        key: of the device, empty without keys.
        size: bytes in the TCP stream.
        parts: how many were received.
        first: the first of them.
    """

    address: bytes
    key: str = ""
    size: int = 0
    parts: int = 0
    first: bytes = b""

    @property
    def frame(self) -> bytes:
        """The only part.

        Raises:
            FrameError: there is not exactly one.
        """
        if self.parts != 1:
            raise FrameError(f"a message of {self.parts} ZeroMQ frames; allowed: 1")
        return self.first


def check_free(bind: str) -> None:
    """Refuse an endpoint that cannot be bound, before a target is loaded for it.

    Raises:
        LinkError: it cannot.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        Router(context, bind, 1, 1, None).close()
    finally:
        context.destroy(linger=0)


class Router:
    """A bound ROUTER socket.

    Args:
        context: of the socket.
        bind: a ZeroMQ endpoint; port 0 chooses a free port.
        max_frame_bytes: longer frames end their connection.
        max_reply_bytes: of a frame that is sent.
        authenticator: admits devices by their keys; None admits every device.

    Attributes:
        socket: to poll for messages.
        connections: to poll for new connections; then call ``accept``.
        address: the endpoint that devices connect to.

    Raises:
        LinkError: the address cannot be bound.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        bind: str,
        max_frame_bytes: int,
        max_reply_bytes: int,
        authenticator: Authenticator | None,
    ) -> None:
        self._keyed = authenticator is not None
        self._envelope_bytes = CURVE_BYTES if self._keyed else 0
        self._partial: ReceivedMessage | None = None
        self.socket = context.socket(zmq.ROUTER)
        for option, value in (
            # Without keys, the address identifies the device, which takes it over when it reconnects.
            # With keys, each connection has its own address, which no other may take over.
            (zmq.ROUTER_HANDOVER, int(not self._keyed)),
            (zmq.MAXMSGSIZE, max_frame_bytes + self._envelope_bytes),
            (zmq.RCVHWM, _messages_in(_QUEUED_BYTES, max_frame_bytes)),
            (zmq.SNDHWM, _messages_in(_UNREAD_BYTES, max_reply_bytes)),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.LINGER, _LINGER_MS),
            (zmq.IPV6, int(bind.startswith("tcp://["))),
        ):
            self.socket.setsockopt(option, value)
        if authenticator:
            authenticator.guard(self.socket)
        self.connections = self.socket.get_monitor_socket(zmq.EVENT_ACCEPTED)
        try:
            self.socket.bind(bind)
        except (zmq.ZMQError, UnicodeError) as error:
            self.close()
            raise LinkError(
                f"cannot bind {bind!r}: {error}; stop what listens there (a base station?), or choose a free address"
            ) from error
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self) -> Iterator[ReceivedMessage]:
        """The messages of a turn; a message of many parts may take several."""
        turn = Turn()
        with contextlib.suppress(zmq.Again):
            while True:
                message, left = self._receive_part(turn)
                if message:
                    yield message
                if not left:
                    return

    def send(self, address: bytes, frame: bytes) -> None:
        """Send a frame; it is dropped where its connection is gone or takes no more."""
        with contextlib.suppress(zmq.Again):
            self.socket.send_multipart([address, frame], zmq.NOBLOCK)

    def accept(self, accepting: bool) -> None:
        """Accept the connections of a turn, or close them. Unbinding would close the open ones as well."""
        turn = Turn()
        while self.connections.poll(0) and turn.spend(0):
            descriptor = recv_monitor_message(self.connections)["value"]
            if not accepting:
                with contextlib.suppress(OSError):
                    self._refuse(descriptor)

    def close(self) -> None:
        """Close the socket; frames that are not sent yet are lost."""
        self.socket.disable_monitor()
        self.connections.close(linger=0)
        self.socket.close(linger=0)

    def _refuse(self, descriptor: int) -> None:
        """Close a device's connection; if it has ended already, its descriptor may be that of another file."""
        copy = os.dup(descriptor)
        try:
            connection = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)
            raise
        with connection:
            if self._is_local_end(connection.family, connection.getsockname()):
                connection.shutdown(socket.SHUT_RDWR)

    def _is_local_end(self, family: int, address: Any) -> bool:
        if family == socket.AF_UNIX:
            return self.address == "ipc://" + os.fsdecode(address).replace("\0", "@", 1)
        return self.address.endswith(f":{address[1]}")

    def _receive_part(self, turn: Turn) -> tuple[ReceivedMessage | None, bool]:
        """Receive a part; returns the message that it completes, if any, and whether anything is left of the turn."""
        part = self.socket.recv(zmq.NOBLOCK, copy=False)
        message = self._partial
        if message is None:
            self._partial = ReceivedMessage(part.bytes)
            return None, True
        size = socket_bytes(part.buffer, self._envelope_bytes)
        message.size += size
        message.parts += 1
        if message.parts == 1:
            message.first = part.bytes
            message.key = str(part.get("User-Id")) if self._keyed else ""
        self._partial = message if part.more else None
        return None if part.more else message, turn.spend(size)


def _messages_in(queued_bytes: int, largest: int) -> int:
    """How many messages may be queued; 0 would be no limit for ZeroMQ."""
    return min(_MAX_QUEUED_MESSAGES, max(1, queued_bytes // largest))
