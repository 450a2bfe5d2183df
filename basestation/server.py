"""The socket of the base station: frames in, frames out, and a queue to and from the engine.

The I/O thread never touches the model and the engine's thread never touches the
socket: frames are received and checked while a forward pass runs, and a slow
peer delays no pass.
"""

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import zmq

from basestation.authentication import Authenticator, check_bind, revocation
from basestation.engine import Engine
from basestation.key_folder import KeyFolder
from basestation.metrics import Metrics
from basestation.pass_records import PassRecordFile
from basestation.peer import Peer
from basestation.profiler import PassProfiler
from basestation.rate_limit import RateLimiter
from basestation.scheduler import PassBudget
from basestation.target_model import TargetModel
from protocol.errors import FrameError, LimitError, LinkError, ProtocolError
from protocol.frames import FrameCodec
from protocol.limits import Limits, option_name
from protocol.messages import Message
from protocol.zmtp import CURVE_BYTES, socket_bytes

logger = logging.getLogger(__name__)

Task: TypeAlias = Callable[[], None]
"""A call that the engine makes in its own thread."""

_POLL_MS = 200
_LINGER_MS = 500
_IDLE_SECONDS = 5.0
_DRAIN_POLL_SECONDS = 0.1
_DEAD_SECONDS = 60.0
_HEARTBEAT_MS = 5000
_HANDSHAKE_MS = 5000
"""A connection that has not identified itself by then is closed, so that idle ones do not hold descriptors."""
_REVOCATION_POLL_SECONDS = 0.5
_MAX_QUEUED_TASKS = 20_000
_MAX_FRAMES_PER_TURN = 500
"""Received before replies are sent, so that a flood of frames only delays them."""
_MAX_TASK_SECONDS = 0.05
"""For queued tasks before a forward pass, so that a flood of requests only delays it."""


class Server:
    """A ROUTER socket in an I/O thread, and the engine behind it.

    Args:
        target: the model to serve.
        bind: a ZeroMQ endpoint like ``tcp://127.0.0.1:5755``; port 0 chooses a free port.
        limits: of what a device may request.
        keys: admit only the devices enrolled here; None admits every device.
        insecure: allow an address that other machines can reach without ``keys``.
        budget: of a forward pass.
        metrics: counters.
        records: gets a line for every round.
        profiler: traces some forward passes.

    Raises:
        SettingsError: other machines can reach the address, and neither ``keys`` nor ``insecure`` is given.
        LinkError: the address cannot be bound.
    """

    def __init__(
        self,
        target: TargetModel,
        bind: str,
        limits: Limits | None = None,
        keys: KeyFolder | None = None,
        insecure: bool = False,
        budget: PassBudget | None = None,
        metrics: Metrics | None = None,
        records: PassRecordFile | None = None,
        profiler: PassProfiler | None = None,
    ) -> None:
        check_bind(bind, keys is not None or insecure)
        self._limits = limits = limits or Limits()
        self._codec = FrameCodec(target.vocabulary.size, limits)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._metrics = metrics or Metrics()
        self._authenticator = Authenticator(keys, self._context, self._metrics) if keys else None
        self._router = self._bind(bind)
        self._outbox = self._context.socket(zmq.PULL)
        self._outbox.bind("inproc://replies")
        self._replies = self._context.socket(zmq.PUSH)
        self._replies.connect("inproc://replies")
        self._inbox: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._engine = Engine(target, limits, budget or PassBudget(), self._deliver, self._metrics, records)
        self._envelope_bytes = CURVE_BYTES if keys else 0
        self._rate_limiter = RateLimiter(limits.max_requests_per_second)
        self._profiler = profiler
        self._stopping = threading.Event()
        self._stop_at = math.inf
        self._beat = time.monotonic()
        self._failure: Exception | None = None
        self._next_revocation_poll = 0.0

    @property
    def address(self) -> str:
        """The endpoint that devices connect to."""
        return self._router.getsockopt_string(zmq.LAST_ENDPOINT)

    def serve(self) -> None:
        """Serve until ``stop`` is called or a thread fails.

        The engine runs in the calling thread. Call it in the thread that loaded the
        target: PyTorch creates a thread pool for each thread that computes, and two
        pools on the same cores halve each other's speed.
        """
        io_thread = threading.Thread(target=self._exchange_frames, name="io", daemon=True)
        io_thread.start()
        try:
            self._run_engine()
        finally:
            self._stopping.set()
            io_thread.join()
            self._flush()
            self._context.destroy(linger=_LINGER_MS)
        if self._failure is not None:
            raise self._failure

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Make ``serve`` return. Safe to call from another thread or a signal handler.

        Args:
            drain_seconds: how long open sessions may continue; new ones are refused.
        """
        self._stop_at = min(self._stop_at, time.monotonic() + drain_seconds)
        self._inbox.put(None)

    @property
    def alive(self) -> bool:
        """Whether the engine made progress in the last minute."""
        return time.monotonic() - self._beat < _DEAD_SECONDS

    @property
    def draining(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stop_at < math.inf

    def _bind(self, bind: str) -> "zmq.Socket[bytes]":
        router = self._context.socket(zmq.ROUTER)
        for option, value in (
            # Without keys, the address identifies the device, which takes it over when it reconnects.
            # With keys, each connection has its own address, which no other may take over.
            (zmq.ROUTER_HANDOVER, int(self._authenticator is None)),
            (zmq.MAXMSGSIZE, self._codec.max_frame_bytes + (CURVE_BYTES if self._authenticator else 0)),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.LINGER, _LINGER_MS),
            (zmq.IPV6, int(bind.startswith("tcp://["))),
        ):
            router.setsockopt(option, value)
        if self._authenticator:
            self._authenticator.guard(router)
        try:
            router.bind(bind)
        except (zmq.ZMQError, UnicodeError) as error:
            self._context.destroy(linger=0)
            raise LinkError(f"cannot bind {bind!r}: {error}; try a free address like tcp://127.0.0.1:5755") from error
        return router

    def _exchange_frames(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._outbox, zmq.POLLIN)
        if self._authenticator:
            poller.register(self._authenticator.socket, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                ready = dict(poller.poll(_POLL_MS))
                if self._authenticator:
                    self._admit(self._authenticator, self._authenticator.socket in ready)
                if self._outbox in ready:
                    self._flush()
                if self._router in ready:
                    self._receive_frames()
        except Exception as error:  # noqa: BLE001 - the thread in ``serve`` raises it
            self._failure = error
            self.stop()

    def _admit(self, authenticator: Authenticator, readable: bool) -> None:
        """Answer a handshake, and regularly end the sessions of revoked keys."""
        if readable:
            authenticator.answer()
        if time.monotonic() >= self._next_revocation_poll:
            self._next_revocation_poll = time.monotonic() + _REVOCATION_POLL_SECONDS
            for key in authenticator.revoked():
                self._inbox.put(partial(self._engine.revoke, key, revocation()))

    def _flush(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._router.send_multipart(self._outbox.recv_multipart(zmq.NOBLOCK), zmq.NOBLOCK)

    def _receive_frames(self) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(_MAX_FRAMES_PER_TURN):
                address, *parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
                task = self._task(address.bytes, parts)
                if task is not None and self._inbox.qsize() < _MAX_QUEUED_TASKS:  # devices resend lost requests
                    self._inbox.put(task)

    def _task(self, address: bytes, parts: list[zmq.Frame]) -> Task | None:
        """The engine's task for a message, if any."""
        peer = Peer.without_key(address)
        if self._authenticator:
            peer = Peer(str(parts[0].get("User-Id")), address)
            if not self._authenticator.admits(peer.owner):
                return partial(self._engine.fault, peer, None, revocation())
        if not self._rate_limiter.allows(peer.owner):
            return self._rate_fault(peer) if self._rate_limiter.should_notify(peer.owner) else None
        try:
            size = sum(socket_bytes(part.bytes, self._envelope_bytes) for part in parts)
            return partial(self._engine.receive, peer, self._decode(parts), size)
        except ProtocolError as error:
            return partial(self._engine.fault, peer, None, error)

    def _rate_fault(self, peer: Peer) -> Task:
        allowed = self._limits.max_requests_per_second
        error = LimitError(option_name("max_requests_per_second"), "more requests a second", allowed)
        return partial(self._engine.fault, peer, None, error)

    def _decode(self, parts: list[zmq.Frame]) -> Message:
        if len(parts) != 1:
            raise FrameError(f"a message of {len(parts)} ZeroMQ frames; allowed: 1")
        return self._codec.decode(parts[0].bytes)

    def _deliver(self, address: bytes, message: Message) -> int:
        frame = self._codec.encode(message)
        self._replies.send_multipart([address, frame])
        return socket_bytes(frame, self._envelope_bytes)

    def _run_engine(self) -> None:
        while not self._stopping.is_set() and not self._finished():
            for task in self._tasks():
                task()
            if self.draining:
                self._engine.drain()
            if self._profiler and self._engine.busy:
                self._profiler.step()
            self._engine.step()
            self._engine.drop_idle()
            self._beat = time.monotonic()
        self._engine.close()

    def _finished(self) -> bool:
        return self.draining and (self._engine.idle or time.monotonic() >= self._stop_at)

    def _tasks(self) -> Iterator[Task]:
        """The queued tasks, for a limited time; waits for the first one if the engine has nothing to run."""
        try:
            if not self._engine.busy:
                yield from self._first_task()
            end = time.monotonic() + _MAX_TASK_SECONDS
            while time.monotonic() < end:
                task = self._inbox.get_nowait()
                if task is not None:
                    yield task
        except queue.Empty:
            pass

    def _first_task(self) -> Iterator[Task]:
        start = time.monotonic()
        try:
            task = self._inbox.get(timeout=_DRAIN_POLL_SECONDS if self.draining else _IDLE_SECONDS)
        finally:
            self._metrics.count_idle(time.monotonic() - start)
        if task is not None:
            yield task
