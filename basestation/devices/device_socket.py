"""The devices' end of a base station: admission, rate limits and the guard on memory around the ROUTER socket.

Knows peers and frames; not what a frame means, and not what is behind the socket.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import zmq

from basestation.devices.authentication import Authenticator, check_bind, revocation
from basestation.devices.key_folder import EnrolledDevice, KeyFolder
from basestation.devices.peer import Peer
from basestation.devices.quarantine import HandshakeLog
from basestation.devices.rate_limit import RateLimiter
from basestation.devices.router import ReceivedMessage, Router, check_free
from basestation.kv_cache.memory_guard import MemoryGuard
from basestation.monitoring.metrics import Metrics
from protocol.errors import EdgedraftError, FrameError, LimitError, RevokedError
from protocol.frames import max_reply_bytes
from protocol.limits import Limits, option_name
from protocol.zmtp import CURVE_BYTES

_CHECK_SECONDS = 0.5
"""Between two checks for revoked keys and of the memory."""
_RETRY_SECONDS = 2
"""After which devices repeat what exceeded a rate: long enough for a Resume and the request at one a second."""


def check_endpoint(bind: str, keys: KeyFolder | None, insecure: bool) -> None:
    """Refuse an endpoint for devices before a target is loaded for it; the arguments are those of ``Admission``.

    Raises:
        SettingsError: other machines can reach the address, and there are neither keys nor ``insecure``.
        LinkError: the address cannot be bound.
    """
    check_bind(bind, keys is not None or insecure)
    check_free(bind)


class FrameReceiver(Protocol):
    """What is behind a socket: an engine, or the front's way to several."""

    def receive(self, peer: Peer, frame: bytes, size: int) -> None:
        """Take a frame that was ``size`` bytes in the TCP stream."""

    def refuse(self, peer: Peer, error: EdgedraftError) -> None:
        """Answer a peer with a Fault that ends no session."""

    def revoke(self, device: EnrolledDevice) -> None:
        """End the sessions of a device whose key was revoked."""


@dataclass(frozen=True)
class Admission:
    """Which devices are admitted, and how much they may take.

    Attributes:
        keys: admit only the devices enrolled here; None admits every device.
        insecure: allow an address that other machines can reach without ``keys``.
        memory_guard: refuses connections, and raises an error, where peers take too much memory.
        handshakes: is told of each handshake, and knows the keys in quarantine.
    """

    keys: KeyFolder | None = None
    insecure: bool = False
    memory_guard: MemoryGuard | None = None
    handshakes: HandshakeLog | None = None


class DeviceSocket:
    """A bound ROUTER socket that lets through what may reach an engine.

    Args:
        context: of the socket.
        bind: a ZeroMQ endpoint like ``tcp://127.0.0.1:5755``; port 0 chooses a free port.
        max_frame_bytes: longer frames end their connection.
        limits: of what a device may request.
        admission: who is let in.
        metrics: counters.

    Attributes:
        address: the endpoint that devices connect to.
        envelope_bytes: that encryption adds to each frame.

    Raises:
        SettingsError: other machines can reach the address, and there are neither keys nor ``insecure``.
        LinkError: the address cannot be bound.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        bind: str,
        max_frame_bytes: int,
        limits: Limits,
        admission: Admission,
        metrics: Metrics,
    ) -> None:
        keys = admission.keys
        check_bind(bind, keys is not None or admission.insecure)
        self._limits = limits
        self._metrics = metrics
        self._authenticator = Authenticator(keys, context, metrics, admission.handshakes) if keys else None
        self._router = Router(context, bind, max_frame_bytes, max_reply_bytes(limits), self._authenticator)
        self._memory_guard = admission.memory_guard
        self._request_limiter = RateLimiter(limits.max_requests_per_second)
        self._byte_limiter = RateLimiter(limits.max_bytes_per_second)
        self._next_check = 0.0
        self.address = self._router.address
        self.envelope_bytes = CURVE_BYTES if keys else 0

    def register(self, poller: zmq.Poller) -> None:
        """Register what ``process`` reads."""
        poller.register(self._router.socket, zmq.POLLIN)
        poller.register(self._router.connections, zmq.POLLIN)
        if self._authenticator:
            poller.register(self._authenticator.socket, zmq.POLLIN)

    def process(self, ready: Mapping[Any, int], receiver: FrameReceiver) -> None:
        """Take what has arrived for a turn, and check keys and memory sometimes.

        Raises:
            OverloadError: peers take more memory than they may; the process must end.
        """
        if self._authenticator and self._authenticator.socket in ready:
            self._authenticator.answer()
        if time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + _CHECK_SECONDS
            self._check(receiver)
        if self._router.connections in ready:
            self._router.accept(self._memory_guard is None or self._memory_guard.accepting)
        if self._router.socket in ready:
            for message in self._router.receive():
                self._take(message, receiver)

    def send(self, address: bytes, frame: bytes) -> None:
        """Send a frame; it is dropped where its connection is gone or takes no more."""
        self._router.send(address, frame)

    def watch(self, owners: Iterable[str]) -> None:
        """Look whether these are still enrolled, as is done with the devices that are connected here."""
        if self._authenticator:
            self._authenticator.watch(owners)

    def _check(self, receiver: FrameReceiver) -> None:
        for device in self._authenticator.revoked() if self._authenticator else ():
            receiver.revoke(device)
        if self._memory_guard:
            self._memory_guard.check()

    def _take(self, message: ReceivedMessage, receiver: FrameReceiver) -> None:
        """Pass on a message that is allowed; devices repeat requests that are dropped, as they are told."""
        peer = self._peer(message)
        exceeded = self._exceeded_rate(peer.owner, message.size)
        if exceeded:
            self._metrics.count_uplink(peer, None, message.size)
            if self._request_limiter.should_notify(peer.owner):
                receiver.refuse(peer, exceeded)
            return
        try:
            frame = self._admitted_frame(peer, message)
        except (FrameError, RevokedError) as error:
            self._metrics.count_uplink(peer, None, message.size)
            receiver.refuse(peer, error)
        else:
            receiver.receive(peer, frame, message.size)

    def _peer(self, message: ReceivedMessage) -> Peer:
        if self._authenticator:
            return Peer(message.key, message.address, self._authenticator.name_of(message.key))
        return Peer.without_key(message.address)

    def _admitted_frame(self, peer: Peer, message: ReceivedMessage) -> bytes:
        if self._authenticator and not self._authenticator.admits(peer.owner):
            raise revocation()
        return message.frame

    def _exceeded_rate(self, owner: str, size: int) -> LimitError | None:
        """Charge an owner for a message; the limit that it exceeds, if any."""
        for limiter, cost, option, what in (
            (self._request_limiter, 1, "max_requests_per_second", "more requests a second"),
            (self._byte_limiter, size, "max_bytes_per_second", "more bytes a second"),
        ):
            if not limiter.allows(owner, cost):
                retry_seconds = _RETRY_SECONDS if cost <= limiter.capacity else 0
                return LimitError(option_name(option), what, getattr(self._limits, option), retry_seconds)
        return None
