"""The device's end of the link: messages over a DEALER socket, with every byte counted.

Knows the socket and the frames; not what a round is. A ``Transport`` moves frames;
tests use one in memory.
"""

import os
import time
from typing import Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from device.link.curve_keys import CurveKeys
from device.link.probe import needs_ipv6
from device.link.version_lookup import VersionLookup
from protocol.errors import AdmissionError, FrameError, ProtocolError, RevokedError, SettingsError
from protocol.frames import FrameCodec
from protocol.messages import Message
from protocol.zmtp import CURVE_BYTES, socket_bytes

_LINGER_MS = 500
_HEARTBEAT_MS = 5000
_RECONNECT_MS = 100
_RECONNECT_MAX_MS = 2000
_MAX_BROKEN_HANDSHAKES = 5
_REVOKED_STATUS = 500
"""The base station's ZAP status code for a revoked key."""


_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)


class Transport(Protocol):
    """Moves frames between a device and a base station; may lose them.

    Attributes:
        connections: how many have been established so far.
        device: the device's name at the base station: its public key, or its routing id without keys.
    """

    @property
    def connections(self) -> int:
        """How many have been established so far."""

    @property
    def device(self) -> str:
        """The device's name at the base station."""

    def send(self, frame: bytes) -> None:
        """Send one frame; it may be lost."""

    def receive(self, timeout: float) -> bytes | None:
        """The next frame, or None after ``timeout`` seconds or when a new connection is established."""

    def close(self) -> None:
        """Flush, and close the socket."""


class SocketTransport:
    """A DEALER socket.

    Without keys, the routing id identifies the device across reconnections. With keys
    the key does, and each connection gets a new routing id: the base station refuses
    one that is in use, and may notice a lost connection later than the device.

    libzmq resolves the host whenever it tries to connect, to an address of one IP version: of the one that ``ipv6``
    says, or if that is None, of the one that the host has now. While there is no connection, the version is looked up
    again.

    Raises:
        SettingsError: ``address`` is not ``tcp://HOST:PORT``.
        LinkError: its host does not resolve, and ``ipv6`` is None.
    """

    def __init__(
        self, address: str, max_frame_bytes: int, keys: CurveKeys | None = None, ipv6: bool | None = None
    ) -> None:
        self._ipv6 = needs_ipv6(address) if ipv6 is None else ipv6
        self._lookup = VersionLookup(address, self._ipv6)
        self._address = address
        self._keys = keys
        self._routing_id = b""
        self._is_connected = False
        self._connections = 0
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
            raise SettingsError("server", address, f"tcp://HOST:PORT ({error})") from error

    def send(self, frame: bytes) -> None:
        """Send one frame; it is dropped where the base station has been unreachable for long.

        Raises:
            AdmissionError: the two ends do not know each other's keys.
        """
        self._handle_events()
        try:
            self._dealer.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return  # the request is sent again until its reply arrives

    def receive(self, timeout: float) -> bytes | None:
        """The next frame, or None after ``timeout`` seconds or when a new connection is established.

        Raises:
            AdmissionError: the two ends do not know each other's keys.
        """
        end, connections = time.monotonic() + timeout, self._connections
        if not self._is_connected:
            self._follow_version()
        while self._connections == connections:
            ready = dict(self._poller.poll(max(0, round((end - time.monotonic()) * 1000))))
            if self._dealer in ready:
                return self._dealer.recv()
            if not ready:
                break
            self._handle_events()
        return None

    @property
    def connections(self) -> int:
        """How many have been established so far.

        Raises:
            AdmissionError: the two ends do not know each other's keys.
        """
        if not self._monitor.closed:
            self._handle_events()
        return self._connections

    @property
    def device(self) -> str:
        """The public key, or the routing id in hexadecimal."""
        return self._keys.public if self._keys else self._routing_id.hex()

    def close(self) -> None:
        """Flush, and close the socket."""
        self._dealer.disable_monitor()
        self._context.destroy(linger=_LINGER_MS)

    def _connect(self) -> None:
        if self._keys or not self._routing_id:
            self._routing_id = b"\x01" + os.urandom(15 if self._keys else 7)  # a leading 0 is reserved
            self._dealer.setsockopt(zmq.ROUTING_ID, self._routing_id)
        self._dealer.setsockopt(zmq.IPV6, int(self._ipv6))
        self._dealer.connect(self._address)

    def _reconnect(self) -> None:
        self._dealer.disconnect(self._address)
        self._connect()

    def _follow_version(self) -> None:
        """Connect over the other IP version if the host needs that one now."""
        needed = self._lookup.needs_ipv6()
        if needed != self._ipv6:
            self._ipv6 = needed
            self._reconnect()

    def _handle_events(self) -> None:
        """Process the socket's connection events."""
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            match event["event"]:
                case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self._connections += 1
                    self._is_connected = True
                case zmq.EVENT_DISCONNECTED:
                    self._is_connected = False
                    if self._keys and self._connections:
                        self._reconnect()
                case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    raise self._refusal(event["value"])
                case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                    self._handle_mismatch(event["value"])
                case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                    self._handle_broken_handshake()

    def _refusal(self, status: int) -> AdmissionError:
        """The error for a ZAP status code."""
        if status == _REVOKED_STATUS:
            return RevokedError(
                f"the base station at {self._address} has revoked this device's key; "
                "make another with: edgedraft-device keys new FILE, and have it enrolled there"
            )
        return AdmissionError(
            f"the base station at {self._address} does not know this device's key; "
            "enroll it there with: edgedraft-basestation keys enroll DIR NAME KEY"
        )

    def _handle_mismatch(self, reason: int) -> None:
        if reason != zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            return  # not a base station: reported when the connect timeout expires
        if self._keys:
            raise AdmissionError(
                f"the base station at {self._address} uses no keys, so it cannot be authenticated; "
                "start it with --keys, or leave out --key and --station-key"
            )
        raise AdmissionError(
            f"the base station at {self._address} admits only devices with keys; pass --key and --station-key"
        )

    def _handle_broken_handshake(self) -> None:
        """A station with another key closes the connection.

        libzmq shows no difference where it has no keys, cannot look into its key folder, or is shutting down.
        """
        self._broken_handshakes += 1
        if self._keys and not self._connections and self._broken_handshakes >= _MAX_BROKEN_HANDSHAKES:
            raise AdmissionError(
                f"the base station at {self._address} does not have the key that --station-key names, uses no keys, or "
                f"cannot look into its key folder: it closed {self._broken_handshakes} handshakes; compare the key "
                "with the output of: edgedraft-basestation keys list DIR"
            )


class Link:
    """Messages to and from the base station.

    Attributes:
        uplink_bytes: sent so far, as counted in the TCP stream: frames and ZeroMQ's framing; lost messages count too.
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
    def connect(
        cls, address: str, codec: FrameCodec, keys: CurveKeys | None = None, ipv6: bool | None = None
    ) -> "Link":
        """A link over TCP, encrypted where there are keys. The base station need not be up yet.

        ``ipv6`` is as of ``SocketTransport``.

        Raises:
            SettingsError: ``address`` is not ``tcp://HOST:PORT``.
            LinkError: its host does not resolve, and ``ipv6`` is None.
        """
        transport = SocketTransport(address, codec.max_frame_bytes, keys, ipv6)
        return cls(transport, codec, address, CURVE_BYTES if keys else 0)

    def send(self, message: Message) -> None:
        """Send one message; it may be lost."""
        frame = self._codec.encode(message)
        self.uplink_bytes += socket_bytes(frame, self._envelope_bytes)
        self._transport.send(frame)

    def use_vocabulary(self, vocab_size: int) -> None:
        """Encode token ids for this many tokens from now on."""
        if vocab_size != self._codec.vocab_size:
            self._codec = FrameCodec(vocab_size, self._codec.limits)

    @property
    def connections(self) -> int:
        """How many connections have been established so far."""
        return self._transport.connections

    @property
    def device(self) -> str:
        """The device's name in the base station's records."""
        return self._transport.device

    def receive(self, timeout: float) -> Message | None:
        """The next message, or None after ``timeout`` seconds or when a new connection is established.

        Raises:
            FrameError: the base station sent bytes that are not a message.
        """
        frame = self._transport.receive(timeout)
        if frame is None:
            return None
        self.downlink_bytes += socket_bytes(frame, self._envelope_bytes)
        try:
            return self._codec.decode(frame)
        except ProtocolError as error:
            raise FrameError(f"{self.address} sent bytes that are not a message: {error}") from error

    def close(self) -> None:
        """Flush, and close the socket."""
        self._transport.close()
