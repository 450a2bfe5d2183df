"""The device's end of the link: messages over a DEALER socket, every byte counted.

Knows the socket and the frames; not what a round is. A ``Transport`` moves
frames; the tests put one in memory in its place.
"""

import os
import time
from typing import Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from device.curve_keys import LinkKeys
from protocol.errors import AdmissionError, FrameError, LinkError, ProtocolError
from protocol.frames import FrameCodec
from protocol.messages import Message
from protocol.zmtp import CURVE_BYTES, socket_bytes

_LINGER_MS = 500
_HEARTBEAT_MS = 5000
_RECONNECT_MS = 100
_RECONNECT_MAX_MS = 2000
_MAX_BROKEN_HANDSHAKES = 3


_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)


class Transport(Protocol):
    """Moves frames between a device and a base station, or loses them.

    Attributes:
        connections: how many there have been, one after the other.
        device: what the base station calls this device: its public key, or its address where there are no keys.
    """

    connections: int

    @property
    def device(self) -> str:
        """See above."""

    def send(self, frame: bytes) -> None:
        """Send one frame, or lose it."""

    def receive(self, timeout: float) -> bytes | None:
        """The next frame, or None after ``timeout`` seconds or with a new connection."""

    def close(self) -> None:
        """Send what is on its way, and end."""


class SocketTransport:
    """A DEALER socket.

    Without keys, its routing id makes it the same peer to the base station when
    it is connected again. With keys the key does, and each connection has a
    routing id of its own: the base station lets nobody have one that is in use,
    and may notice only later than the device that a connection is gone.

    Raises:
        LinkError: ``address`` is no ZeroMQ endpoint.
    """

    def __init__(self, address: str, max_frame_bytes: int, keys: LinkKeys | None = None) -> None:
        self._address = address
        self._keys = keys
        self.connections = 0
        self._broken_handshakes = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.MAXMSGSIZE, max_frame_bytes + (CURVE_BYTES if keys else 0)),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.RECONNECT_IVL, _RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS),
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.LINGER, _LINGER_MS),
        ):
            self._dealer.setsockopt(option, value)
        if keys:
            keys.protect(self._dealer)
        self._monitor = self._dealer.get_monitor_socket(_HANDSHAKES)
        self._poller = zmq.Poller()
        self._poller.register(self._dealer, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            self._connect()
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise LinkError(f"{address!r} is no address: {error}; allowed: tcp://HOST:PORT") from error

    def send(self, frame: bytes) -> None:
        """Send one frame; lost where nobody has been reachable for long.

        Raises:
            AdmissionError: the two ends do not know each other's keys.
        """
        self._heed_handshakes()
        try:
            self._dealer.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return  # the request is repeated until its reply is there

    def receive(self, timeout: float) -> bytes | None:
        """The next frame, or None after ``timeout`` seconds or with a new connection.

        Raises:
            AdmissionError: the two ends do not know each other's keys.
        """
        end, connections = time.monotonic() + timeout, self.connections
        while self.connections == connections:
            ready = dict(self._poller.poll(max(0, round((end - time.monotonic()) * 1000))))
            if self._dealer in ready:
                return self._dealer.recv()
            if not ready:
                break
            self._heed_handshakes()
        return None

    @property
    def device(self) -> str:
        """The public key, or the address, as the base station writes it down."""
        return self._keys.public if self._keys else self._routing_id.hex()

    def close(self) -> None:
        """Send what is on its way, and end."""
        self._dealer.disable_monitor()
        self._context.destroy(linger=_LINGER_MS)

    def _connect(self) -> None:
        self._routing_id = b"\x01" + os.urandom(15 if self._keys else 7)  # 0 first is reserved
        self._dealer.setsockopt(zmq.ROUTING_ID, self._routing_id)
        self._dealer.connect(self._address)

    def _heed_handshakes(self) -> None:
        """Take note of all that happened to the connection."""
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            match event["event"]:
                case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self.connections += 1
                case zmq.EVENT_DISCONNECTED if self._keys and self.connections:
                    self._dealer.disconnect(self._address)
                    self._connect()
                case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    raise AdmissionError(
                        f"the base station at {self._address} does not know this device's key; "
                        "enroll it there with: edgedraft-basestation keys enroll DIR NAME KEY"
                    )
                case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                    self._heed_mismatch(event["value"])
                case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                    self._heed_broken_handshake()

    def _heed_mismatch(self, reason: int) -> None:
        if reason != zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            return  # no base station answers there: told when the device has waited for one
        if self._keys:
            raise AdmissionError(
                f"the base station at {self._address} uses no keys, so it cannot prove who it is; "
                "start it with --keys, or leave out --key and --station-key"
            )
        raise AdmissionError(
            f"the base station at {self._address} lets in only devices with keys; name them: --key and --station-key"
        )

    def _heed_broken_handshake(self) -> None:
        """A station with another key just hangs up, as may one without keys or one that is being stopped."""
        self._broken_handshakes += 1
        if self._keys and not self.connections and self._broken_handshakes >= _MAX_BROKEN_HANDSHAKES:
            raise AdmissionError(
                f"the base station at {self._address} is another one than the station key says, or uses no keys: "
                f"it hung up on {self._broken_handshakes} handshakes; compare the key with what it says there: "
                "edgedraft-basestation keys list DIR"
            )


class Link:
    """Messages to and from the base station.

    Attributes:
        uplink_bytes: sent so far, as they lie in the TCP stream: frames and ZeroMQ's framing of them.
        downlink_bytes: received so far, likewise.
    """

    def __init__(self, transport: Transport, codec: FrameCodec, address: str, envelope_bytes: int = 0) -> None:
        self.address = address
        self.uplink_bytes = 0
        self.downlink_bytes = 0
        self._transport = transport
        self._codec = codec
        self._envelope_bytes = envelope_bytes

    @classmethod
    def connect(cls, address: str, codec: FrameCodec, keys: LinkKeys | None = None) -> "Link":
        """A link over TCP, encrypted where there are keys. Nobody needs to be there yet."""
        transport = SocketTransport(address, codec.max_frame_bytes, keys)
        return cls(transport, codec, address, CURVE_BYTES if keys else 0)

    def send(self, message: Message) -> None:
        """Send one message, or lose it."""
        frame = self._codec.encode(message)
        self.uplink_bytes += socket_bytes(frame, self._envelope_bytes)
        self._transport.send(frame)

    @property
    def connections(self) -> int:
        """How many connections there have been, one after the other."""
        return self._transport.connections

    @property
    def device(self) -> str:
        """What the base station calls this device in its records."""
        return self._transport.device

    def receive(self, timeout: float) -> Message | None:
        """The next message, or None after ``timeout`` seconds or with a new connection.

        Raises:
            FrameError: the base station sent something else than a message.
        """
        frame = self._transport.receive(timeout)
        if frame is None:
            return None
        self.downlink_bytes += socket_bytes(frame, self._envelope_bytes)
        try:
            return self._codec.decode(frame)
        except ProtocolError as error:
            raise FrameError(f"{self.address} sent what is no message: {error}") from error

    def close(self) -> None:
        """Send what is on its way, and end."""
        self._transport.close()
