"""The socket of the base station: frames in, frames out, and a queue to and from the engine.

The I/O thread never touches the model and the engine's thread never touches the
socket: frames are received and checked while a forward pass runs, and a slow
peer delays no pass.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import zmq

from basestation.authentication import Authenticator, check_bind, revocation
from basestation.engine import Engine
from basestation.held_bytes import held_bytes
from basestation.inbox import Inbox, Task
from basestation.key_folder import KeyFolder
from basestation.memory_guard import MemoryGuard
from basestation.metrics import Metrics
from basestation.pass_records import PassRecordFile
from basestation.peer import Peer
from basestation.profiler import PassProfiler
from basestation.rate_limit import RateLimiter
from basestation.router import ReceivedMessage, Router, Turn
from basestation.scheduler import PassBudget
from basestation.target_model import TargetModel
from protocol.errors import LimitError, LinkError, ProtocolError, RevokedError
from protocol.frames import FrameCodec
from protocol.limits import Limits, option_name
from protocol.messages import Message
from protocol.zmtp import CURVE_BYTES, socket_bytes

logger = logging.getLogger(__name__)

_POLL_MS = 200
_LINGER_MS = 500
_IDLE_SECONDS = 5.0
_DRAIN_POLL_SECONDS = 0.1
_DEAD_SECONDS = 60.0
_CHECK_SECONDS = 0.5
"""Between two checks for revoked keys and of the memory."""
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
        memory_guard: refuses connections, and ends ``serve``, where peers take too much memory.

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
        memory_guard: MemoryGuard | None = None,
    ) -> None:
        check_bind(bind, keys is not None or insecure)
        self._limits = limits = limits or Limits()
        self._codec = FrameCodec(target.vocabulary.size, limits)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._metrics = metrics or Metrics()
        self._authenticator = Authenticator(keys, self._context, self._metrics) if keys else None
        try:
            self._router = Router(self._context, bind, self._codec.max_frame_bytes, self._authenticator)
        except LinkError:
            self._context.destroy(linger=0)
            raise
        self._outbox, self._replies = self._reply_sockets()
        self._inbox = Inbox(limits.max_held_bytes)
        self._compiler = ThreadPoolExecutor(1, "grammar")
        passes = (budget or PassBudget(), self._deliver, self._metrics, records)
        self._engine = Engine(target, limits, *passes, run_elsewhere=self._run_elsewhere)
        self._envelope_bytes = CURVE_BYTES if keys else 0
        self._request_limiter = RateLimiter(limits.max_requests_per_second)
        self._byte_limiter = RateLimiter(limits.max_bytes_per_second)
        self._memory_guard = memory_guard
        self._profiler = profiler
        self._stopping = threading.Event()
        self._stop_at = math.inf
        self._beat = time.monotonic()
        self._failure: Exception | None = None
        self._next_check = 0.0

    @property
    def address(self) -> str:
        """The endpoint that devices connect to."""
        return self._router.address

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
            while self._outbox.poll(0):
                self._flush(Turn())
            self._context.destroy(linger=_LINGER_MS)
            self._compiler.shutdown(cancel_futures=True)
        if self._failure is not None:
            raise self._failure

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Make ``serve`` return. Safe to call from another thread or a signal handler.

        Args:
            drain_seconds: how long open sessions may continue; new ones are refused.
        """
        self._stop_at = min(self._stop_at, time.monotonic() + drain_seconds)
        self._inbox.wake()

    @property
    def alive(self) -> bool:
        """Whether the engine made progress in the last minute."""
        return time.monotonic() - self._beat < _DEAD_SECONDS

    @property
    def draining(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stop_at < math.inf

    def _reply_sockets(self) -> "tuple[zmq.Socket[bytes], zmq.Socket[bytes]]":
        """Where the I/O thread receives replies, and where the engine sends them."""
        outbox, replies = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
        outbox.bind("inproc://replies")
        replies.connect("inproc://replies")
        return outbox, replies

    def _exchange_frames(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router.socket, zmq.POLLIN)
        poller.register(self._router.connections, zmq.POLLIN)
        poller.register(self._outbox, zmq.POLLIN)
        if self._authenticator:
            poller.register(self._authenticator.socket, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                ready = dict(poller.poll(_POLL_MS))
                if self._authenticator and self._authenticator.socket in ready:
                    self._authenticator.answer()
                if time.monotonic() >= self._next_check:
                    self._next_check = time.monotonic() + _CHECK_SECONDS
                    self._check()
                if self._router.connections in ready:
                    self._router.accept(self._memory_guard is None or self._memory_guard.accepting)
                if self._outbox in ready:
                    self._flush(Turn())
                if self._router.socket in ready:
                    for message in self._router.receive():
                        self._queue(message)
        except Exception as error:  # noqa: BLE001 - the thread in ``serve`` raises it
            self._failure = error
            self.stop()

    def _check(self) -> None:
        """End the sessions of revoked keys, and check the memory."""
        for device in self._authenticator.revoked() if self._authenticator else ():
            self._inbox.put(partial(self._engine.revoke, device.public_key, device.name, revocation()))
        if self._memory_guard:
            self._memory_guard.check()

    def _flush(self, turn: Turn) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                address, frame = self._outbox.recv_multipart(zmq.NOBLOCK)
                self._router.send(address, frame)
                if not turn.spend(len(frame)):
                    return

    def _queue(self, message: ReceivedMessage) -> None:
        """Queue the engine's task for a message, if any; devices resend requests that are dropped."""
        peer = self._peer(message)
        exceeded = self._exceeded_rate(peer.owner, message.size)
        if exceeded:
            if self._request_limiter.should_notify(peer.owner):
                self._inbox.put(partial(self._engine.fault, peer, None, exceeded))
            return
        try:
            request = self._decode(peer, message)
        except (ProtocolError, RevokedError) as error:
            self._inbox.put(partial(self._engine.fault, peer, None, error))
        else:
            task = partial(self._engine.receive, peer, request, message.size)
            self._inbox.put(task, peer.owner, held_bytes(request))

    def _peer(self, message: ReceivedMessage) -> Peer:
        if self._authenticator:
            return Peer(message.key, message.address, self._authenticator.name_of(message.key))
        return Peer.without_key(message.address)

    def _decode(self, peer: Peer, message: ReceivedMessage) -> Message:
        if self._authenticator and not self._authenticator.admits(peer.owner):
            raise revocation()
        return self._codec.decode(message.frame)

    def _exceeded_rate(self, owner: str, size: int) -> LimitError | None:
        """Charge an owner for a message; the limit that it exceeds, if any."""
        for limiter, cost, option, what in (
            (self._request_limiter, 1, "max_requests_per_second", "more requests a second"),
            (self._byte_limiter, size, "max_bytes_per_second", "more bytes a second"),
        ):
            if not limiter.allows(owner, cost):
                return LimitError(option_name(option), what, getattr(self._limits, option))
        return None

    def _deliver(self, address: bytes, message: Message) -> int:
        frame = self._codec.encode(message)
        self._replies.send_multipart([address, frame])
        return socket_bytes(frame, self._envelope_bytes)

    def _run_elsewhere(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        """Run ``work`` in the compiler's thread, then ``then`` in the engine's."""
        self._compiler.submit(work).add_done_callback(lambda _: self._inbox.put(then))

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
        task = self._inbox.get(0) if self._engine.busy else self._first_task()
        end = time.monotonic() + _MAX_TASK_SECONDS
        while task is not None:
            yield task
            task = self._inbox.get(0) if time.monotonic() < end else None

    def _first_task(self) -> Task | None:
        start = time.monotonic()
        task = self._inbox.get(_DRAIN_POLL_SECONDS if self.draining else _IDLE_SECONDS)
        self._metrics.count_idle(time.monotonic() - start)
        return task
