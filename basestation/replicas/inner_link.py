"""The sockets between the front and its replicas, and between a replica's ranks: encrypted with a key of theirs."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import zmq
from zmq.auth.thread import ThreadAuthenticator

from basestation.devices.router import Turn
from protocol.errors import LinkError

_DOMAIN = "replicas"
_LINGER_MS = 500
_RECONNECT_MS = 50
_RECONNECT_MAX_MS = 500
_HEARTBEAT_MS = 5000
_SILENT_MS = 15_000
"""After which a connection without a heartbeat is given up, by either end; Ray and PyTorch may keep all cores busy."""
_MAX_QUEUED_MESSAGES = 10_000


class Delivery(Enum):
    """What became of a message to a replica, or a rank."""

    SENT = auto()
    DROPPED = auto()
    """It takes no more messages at the moment."""
    GONE = auto()


@dataclass(frozen=True)
class InnerKey:
    """The key pair that both ends of an inner link share; whoever has it may be a replica, or a rank of one."""

    public: bytes
    secret: bytes

    @classmethod
    def new(cls) -> "InnerKey":
        """A random key pair."""
        return cls(*zmq.curve_keypair())

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a key is admitted; ZeroMQ's authenticator asks it."""
        return domain == _DOMAIN and key == self.public


class InnerSocket:
    """The end of the front, or of rank 0: a ROUTER that notices where a replica, or a rank, is gone.

    Args:
        bind: a ZeroMQ endpoint.
        key: of the inner link.

    Raises:
        LinkError: the address cannot be bound.
    """

    def __init__(self, bind: str, key: InnerKey) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_DOMAIN, key)
        self.socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.ROUTER_HANDOVER, 1),  # a connection of which only the other end broke is taken over
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, _SILENT_MS),
            (zmq.SNDHWM, _MAX_QUEUED_MESSAGES),
            (zmq.RCVHWM, _MAX_QUEUED_MESSAGES),
            (zmq.LINGER, _LINGER_MS),
            (zmq.CURVE_SERVER, 1),
            (zmq.CURVE_SECRETKEY, key.secret),
            (zmq.ZAP_DOMAIN, _DOMAIN.encode()),
            (zmq.ZAP_ENFORCE_DOMAIN, 1),
        ):
            self.socket.setsockopt(option, value)
        try:
            self.socket.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            raise LinkError(f"cannot bind {bind!r} for replicas: {error}; choose a free address") from error
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self) -> Iterator[list[bytes]]:
        """The messages of a turn: the replica's identity, then what it sent; nothing where it has just connected."""
        turn = Turn()
        with contextlib.suppress(zmq.Again):
            while True:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
                yield parts
                if not turn.spend(sum(map(len, parts))):
                    return

    def send(self, replica: bytes, parts: Sequence[bytes]) -> Delivery:
        """Send to a replica."""
        try:
            self.socket.send_multipart([replica, *parts], zmq.NOBLOCK)
        except zmq.Again:
            return Delivery.DROPPED
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return Delivery.GONE
        return Delivery.SENT

    def close(self) -> None:
        """Flush, and close the socket."""
        self._authenticator.stop()
        self._context.destroy(linger=_LINGER_MS)


def connect_inner(
    context: "zmq.Context[zmq.Socket[bytes]]", address: str, key: InnerKey, identity: bytes
) -> "zmq.Socket[bytes]":
    """The other end: a DEALER that announces itself on each connection, and queues nothing without one."""
    socket = context.socket(zmq.DEALER)
    for option, value in (
        (zmq.ROUTING_ID, identity),
        (zmq.PROBE_ROUTER, 1),
        (zmq.IMMEDIATE, 1),
        (zmq.RECONNECT_IVL, _RECONNECT_MS),
        (zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS),
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
        (zmq.HEARTBEAT_TIMEOUT, _SILENT_MS),
        (zmq.SNDHWM, _MAX_QUEUED_MESSAGES),
        (zmq.RCVHWM, _MAX_QUEUED_MESSAGES),
        (zmq.LINGER, _LINGER_MS),
        (zmq.CURVE_SERVERKEY, key.public),
        (zmq.CURVE_PUBLICKEY, key.public),
        (zmq.CURVE_SECRETKEY, key.secret),
    ):
        socket.setsockopt(option, value)
    socket.connect(address)
    return socket
