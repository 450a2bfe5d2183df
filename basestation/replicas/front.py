"""The front of several replicas: the devices' socket, and a link to each replica.

It answers Hello from what the replicas report, and sends every other frame to the
replica that has its session. It reads no more than the head of these frames and holds
no state of a session, so that it can be ended at any time: the replicas report their
sessions to the next one, and devices resume.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import zmq

from basestation.devices.authentication import revocation
from basestation.devices.device_socket import Admission, DeviceSocket
from basestation.devices.faults import counted_fault, log_fault
from basestation.devices.handshake import Handshake
from basestation.devices.key_folder import EnrolledDevice
from basestation.devices.peer import Peer
from basestation.engine.load import SessionKey
from basestation.engine.pace import Pace
from basestation.replicas.front_metrics import FrontMetrics
from basestation.replicas.inner_link import Delivery, InnerKey, InnerSocket
from basestation.replicas.inner_messages import Command, Report, encode_peer
from basestation.replicas.routing import Route, Routing
from basestation.target.served_target import ServedTarget
from protocol.errors import (
    ClosingError,
    EdgedraftError,
    FrameError,
    FullError,
    UnknownSessionError,
)
from protocol.frames import FrameCodec, FrameHead
from protocol.limits import Limits
from protocol.messages import Close, Fault, Hello, Message, Open
from protocol.zmtp import socket_bytes

logger = logging.getLogger(__name__)

_POLL_MS = 100
_DEAD_SECONDS = 60.0
_LINGER_MS = 500
_PROBE_SECONDS = 0.25
_GATHER_SECONDS = 2.0
"""How long a front that has just started waits for the reports of all replicas before it declares a session unknown,
or ends because it drains and has none."""
_MAX_HELD = 10_000
_MAX_HELD_BYTES = 64 * 2**20
_RETRY_SECONDS = 1
"""After which a device tries again where no replica is ready."""


@dataclass(frozen=True)
class FrontOptions:
    """Where a front listens.

    Attributes:
        bind: for devices.
        inner_bind: for replicas.
        inner_key: that replicas have too.
        replicas: how many are expected.
        limits: of what a device may request.
    """

    bind: str
    inner_bind: str
    inner_key: InnerKey
    replicas: int
    limits: Limits


class Front:
    """Routes the frames of devices and replicas, in the calling thread.

    Args:
        options: where it listens.
        admission: which devices are let in.
        metrics: counters.
        on_serving: called with the address for devices once it is bound, which is when a target is known.
        on_replicas: called with the names of the replicas whenever they change.
        on_refused: called with the name of a replica that gets no sessions, and the reason.

    Raises:
        LinkError: the address for replicas cannot be bound.
    """

    def __init__(
        self,
        options: FrontOptions,
        admission: Admission,
        metrics: FrontMetrics | None = None,
        on_serving: Callable[[str], None] = lambda _: None,
        on_replicas: Callable[[Collection[str]], None] = lambda _: None,
        on_refused: Callable[[str, str], None] = lambda *_: None,
    ) -> None:
        self._options = options
        self._admission = admission
        self._metrics = metrics or FrontMetrics()
        self._on_serving = on_serving
        self._on_replicas = on_replicas
        self._on_refused = on_refused
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._replicas = InnerSocket(options.inner_bind, options.inner_key)
        self._poller = zmq.Poller()
        self._poller.register(self._replicas.socket, zmq.POLLIN)
        self._devices: DeviceSocket | None = None
        self.routing = Routing()
        self._admitted: dict[bytes, int] = {}
        """Context lengths by identity."""
        self._held: deque[tuple[Peer, FrameHead, bytes, int]] = deque()
        self._held_bytes = 0
        self._held_sessions: set[SessionKey] = set()  # whose further frames stay behind those that are held
        self._gather_until = time.monotonic() + _GATHER_SECONDS
        self._next_probe = 0.0
        self._watched: tuple[int, Callable[[], None]] | None = None
        self._drain_by = math.inf
        self._told_to_drain: dict[bytes, float] = {}
        self._stop_at = math.inf
        self._beat = time.monotonic()

    @property
    def inner_address(self) -> str:
        """The endpoint that replicas connect to."""
        return self._replicas.address

    @property
    def alive(self) -> bool:
        """Whether messages were taken in the last minute, if there were any."""
        return time.monotonic() - self._beat < _DEAD_SECONDS

    @property
    def ready(self) -> bool:
        """Whether new sessions are accepted."""
        return not self._draining and any(not one.draining for one in self.routing.replicas.values())

    def serve(self) -> None:
        """Route until ``stop`` or the last replica has drained."""
        try:
            while not self._finished():
                self._beat = time.monotonic()
                ready = dict(self._poller.poll(_POLL_MS))
                if self._replicas.socket in ready:
                    for identity, *parts in self._replicas.receive():
                        self._take(identity, parts)
                if self._devices:
                    self._devices.process(ready, self)
                if self._watched and self._watched[0] in ready:
                    self._watched[1]()
                self._check(time.monotonic())
        finally:
            self._replicas.close()
            self._context.destroy(linger=_LINGER_MS)

    def stop(self) -> None:
        """Make ``serve`` return soon. Safe to call from another thread or a signal handler."""
        self._stop_at = 0.0

    def watch(self, descriptor: int, on_readable: Callable[[], None]) -> None:
        """Call ``on_readable`` in the thread of ``serve`` when a file descriptor has something to read."""
        self._poller.register(descriptor, zmq.POLLIN)
        self._watched = descriptor, on_readable

    def drain(self, drain_seconds: float, name: str | None = None) -> None:
        """Let the sessions of the replica with that name finish, or with None of all; ``serve`` returns after all.

        Replicas that report later drain as well. A front that has just started lets devices come back first: a
        replica ends when its sessions are idle.
        """
        if name is None:
            self._drain_by = min(self._drain_by, time.monotonic() + drain_seconds)
            self._stop_at = min(self._stop_at, self._drain_by + _GATHER_SECONDS)
            return
        for replica in list(self.routing.replicas.values()):
            if replica.name == name:
                replica.draining = True
                self._send_drain(replica.identity, drain_seconds)

    def receive(self, peer: Peer, frame: bytes, size: int) -> None:
        """Answer a Hello, and send any other frame to the replica of its session."""
        try:
            head = self._codec.head(frame)
            if head.kind is Hello:
                self._greet(peer, self._codec.decode(frame), size)
            else:
                self._forward(peer, head, frame, size)
        except FrameError as error:
            self._metrics.count_uplink(peer, None, size)
            self.refuse(peer, error)

    def refuse(self, peer: Peer, error: EdgedraftError) -> None:
        """Answer a peer with a Fault that ends no session."""
        self._send_fault(peer, None, error)

    def revoke(self, device: EnrolledDevice) -> None:
        """End the sessions of a device whose key was revoked; a replica that still reports some is told again."""
        logger.warning("peer %s: %s", device.public_key[:8], revocation())
        self._handshake.drop(device.public_key)
        self._metrics.fleet.forget(device.name)
        head = Command.REVOKE.head(encode_peer(Peer(device.public_key, b"", device.name)))
        for identity in list(self.routing.replicas):
            self._send(identity, head)

    @property
    def _draining(self) -> bool:
        return self._drain_by < math.inf

    def _finished(self) -> bool:
        now = time.monotonic()
        return now >= self._stop_at or (self._draining and not self.routing.replicas and now >= self._gather_until)

    def _check(self, now: float) -> None:
        """Notice lost replicas, tell the others to drain, and route what was held once all have reported."""
        if now >= self._next_probe:
            self._next_probe = now + _PROBE_SECONDS
            for identity in list(self.routing.replicas):
                self._send(identity, Command.PROBE.head())
            for identity in self.routing.silent(now):
                self._lose(identity)
        if self._draining and now >= min(self._gather_until, self._drain_by):
            self._drain_replicas(now)
        if self._held and not self._gathering:
            held, self._held, self._held_bytes, self._held_sessions = self._held, deque(), 0, set()
            for peer, head, frame, size in held:
                self._forward(peer, head, frame, size)

    def _drain_replicas(self, now: float) -> None:
        """Tell the replicas that do not know by when they must have drained."""
        seconds = max(0.0, self._drain_by - now)
        for identity in list(self.routing.replicas):
            if self._told_to_drain.get(identity) != self._drain_by and self._send_drain(identity, seconds):
                self._told_to_drain[identity] = self._drain_by

    @property
    def _gathering(self) -> bool:
        """Whether sessions may be at replicas that have not reported to this front yet."""
        return len(self.routing.replicas) < self._options.replicas and time.monotonic() < self._gather_until

    def _take(self, identity: bytes, parts: list[bytes]) -> None:
        """Take what a replica sent: its first, empty message, a frame for a device, or a report."""
        if len(parts) < 2:
            self._send(identity, Command.DESCRIBE.head())
        elif parts[0]:
            if self._devices:
                self._devices.send(parts[0], parts[1])
        else:
            self._take_report(identity, Report.decode(parts[1]))

    def _take_report(self, identity: bytes, report: Report) -> None:
        if report.target:
            self._admit(identity, report.name, report.target)
        if identity not in self._admitted:
            return
        for other in list(self.routing.replicas.values()):
            if other.name == report.name and other.identity != identity:
                self._lose(other.identity)  # it was started again
        is_new = identity not in self.routing.replicas
        self.routing.update(identity, report, time.monotonic())
        self._metrics.take(identity, report)
        assert self._devices
        self._devices.watch(owner for owner, _ in report.load.sessions)
        if is_new:
            logger.info("replica %s reports %d sessions", report.name, len(report.load.sessions))
            self._on_replicas(self.routing.names)
            self._update_context_length()

    def _admit(self, identity: bytes, name: str, target: ServedTarget) -> None:
        """Let a replica have sessions, unless it cannot serve devices that know the target of the others."""
        if not self._devices:
            self._open(target)
        if reason := self._target.obstacle(target):
            self._on_refused(name, reason)
            return
        self._admitted[identity] = target.context_length

    def _update_context_length(self) -> None:
        """Tell devices of the smallest context length of the live replicas from now on."""
        lengths = [self._admitted[identity] for identity in self.routing.replicas]
        length = min(lengths, default=self._target.context_length)
        if length != self._target.context_length:
            logger.info("devices are told of a context of %d tokens, the smallest of the replicas", length)
            self._announce(replace(self._target, context_length=length))

    def _announce(self, target: ServedTarget) -> None:
        """Tell devices of a target from now on; one that greeted before must greet again at a new replica."""
        self._target = target
        self._handshake = Handshake(target, self._options.limits)

    def _open(self, target: ServedTarget) -> None:
        """Begin to serve devices, now that the target is known."""
        options = self._options
        self._announce(target)
        self._codec = FrameCodec(target.vocabulary.size, options.limits)
        size = self._codec.max_frame_bytes
        self._devices = DeviceSocket(self._context, options.bind, size, options.limits, self._admission, self._metrics)
        self._devices.register(self._poller)
        self._gather_until = time.monotonic() + _GATHER_SECONDS
        self._on_serving(self._devices.address)

    def _greet(self, peer: Peer, hello: Message, size: int) -> None:
        assert isinstance(hello, Hello)
        self._update_context_length()  # replicas may have gone
        self._metrics.count_uplink(peer, None, size)
        proposed = self.routing.proposed(peer.owner)
        try:
            welcome = self._handshake.greet(peer.owner, hello, proposed.load.pace if proposed else Pace())
        except EdgedraftError as error:
            self.refuse(peer, error)
        else:
            self._deliver(peer, welcome)

    def _forward(self, peer: Peer, head: FrameHead, frame: bytes, size: int) -> None:
        """Send a frame to its replica, which counts it, or hold it; one that is answered or dropped is counted here."""
        is_behind = (peer.owner, head.session_id) in self._held_sessions
        try:
            replica = None if is_behind else self._replica_of(peer, head)
        except EdgedraftError as error:
            self._metrics.count_uplink(peer, None, size)
            self._send_fault(peer, head.session_id, error)
            return
        if replica is not None:
            known = Peer(peer.owner, peer.address, peer.name, self._handshake.version_of(peer.owner))
            is_taken = self._send(replica, Command.REQUEST.head(encode_peer(known)), frame)
        else:
            is_taken = (is_behind or self._gathering) and self._hold(peer, head, frame, size)
        if not is_taken:
            self._metrics.count_uplink(peer, None, size)

    def _replica_of(self, peer: Peer, head: FrameHead) -> bytes | None:
        """The replica that a frame goes to; None to hold it while replicas report, and then to drop it.

        Raises:
            UnknownSessionError: no replica has the session.
            ClosingError: it would open a session, and the base station is shutting down.
            FullError: it would open a session, and no replica takes one.
        """
        if head.session_id is None:
            proposed = self.routing.proposed(peer.owner)
            return proposed.identity if proposed else None
        key = (peer.owner, head.session_id)
        route = self.routing.route(key)
        if route is None and self._gathering:
            return None
        if route is None and head.kind is Open:
            route = self._open_session(key)
        if route is None:
            if head.kind in (Close, Fault):
                return None
            raise UnknownSessionError(f"session {head.session_id} is not open")
        route.peer = peer
        return route.replica

    def _open_session(self, key: SessionKey) -> Route:
        if self._draining:
            raise ClosingError("the base station is shutting down")
        route = self.routing.open(key, time.monotonic())
        if route is None:
            raise FullError(f"no replica is ready; retry in {_RETRY_SECONDS} s", _RETRY_SECONDS)
        return route

    def _hold(self, peer: Peer, head: FrameHead, frame: bytes, size: int) -> bool:
        """Keep a frame until the replicas have reported, if there is room; devices resend what is dropped."""
        if len(self._held) >= _MAX_HELD or self._held_bytes + len(frame) > _MAX_HELD_BYTES:
            return False
        self._held.append((peer, head, frame, size))
        self._held_bytes += len(frame)
        if head.session_id is not None:
            self._held_sessions.add((peer.owner, head.session_id))
        return True

    def _send(self, identity: bytes, *parts: bytes) -> bool:
        """Send to a replica; whether it took the message."""
        delivery = self._replicas.send(identity, parts)
        if delivery is Delivery.GONE:
            self._lose(identity)
        return delivery is Delivery.SENT

    def _send_drain(self, identity: bytes, drain_seconds: float) -> bool:
        return self._send(identity, Command.DRAIN.head(str(drain_seconds).encode()))

    def _lose(self, identity: bytes) -> None:
        """Forget a replica, and tell the devices of its sessions, which then open them elsewhere."""
        replica = self.routing.replicas.get(identity)
        if replica is None:
            return
        lost = self.routing.drop(identity)
        self._metrics.drop(identity, replica.name)
        logger.warning("replica %s is gone, with %d sessions", replica.name, len(lost))
        self._on_replicas(self.routing.names)
        for (_, session_id), route in lost:
            if route.peer:
                self._send_fault(route.peer, session_id, UnknownSessionError(f"session {session_id} is lost"))

    def _send_fault(self, peer: Peer, session_id: int | None, error: EdgedraftError) -> None:
        log_fault(peer, session_id, error)
        self._deliver(peer, counted_fault(peer, session_id, error, self._handshake, self._metrics))

    def _deliver(self, peer: Peer, message: Message) -> None:
        assert self._devices
        frame = self._codec.encode(message)
        self._devices.send(peer.address, frame)
        self._metrics.count_downlink(peer, None, socket_bytes(frame, self._devices.envelope_bytes))
