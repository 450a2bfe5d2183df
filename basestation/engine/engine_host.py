"""The engine with a socket at its side: frames in, frames out, and a queue in between.

The I/O thread never touches the model and the engine's thread never touches the
socket: frames are received and checked while a forward pass runs, and a slow
peer delays no pass.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import zmq

from basestation.devices.authentication import revocation
from basestation.devices.device_socket import FrameReceiver
from basestation.devices.key_folder import EnrolledDevice
from basestation.devices.peer import Peer
from basestation.devices.router import Turn
from basestation.engine.engine import Engine
from basestation.engine.inbox import Inbox, Task
from basestation.engine.pass_records import PassRecordFile
from basestation.engine.profiler import PassProfiler
from basestation.engine.scheduler import PassBudget
from basestation.monitoring.metrics import Metrics
from basestation.sessions.held_bytes import held_bytes
from basestation.target.target_model import TargetModel
from protocol.errors import EdgedraftError, ProtocolError
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import Message
from protocol.zmtp import socket_bytes

_POLL_MS = 200
_LINGER_MS = 500
_IDLE_POLL_SECONDS = 5.0
_DRAIN_POLL_SECONDS = 0.1
_DEAD_SECONDS = 60.0
_MAX_TASK_SECONDS = 0.05
"""For queued tasks before a forward pass, so that a flood of requests only delays it."""


class FrameSocket(Protocol):
    """A socket that frames come from and go to: the devices' own, or a link to the front.

    Attributes:
        envelope_bytes: that encryption adds to each frame between it and the devices.
    """

    envelope_bytes: int

    def register(self, poller: zmq.Poller) -> None:
        """Register what ``process`` reads."""

    def process(self, ready: Mapping[Any, int], receiver: FrameReceiver) -> None:
        """Take what has arrived for a turn."""

    def send(self, address: bytes, frame: bytes) -> None:
        """Send a frame to a device."""


@dataclass(frozen=True)
class PassOptions:
    """How forward passes run and who watches them; see ``EngineHost``."""

    budget: PassBudget | None = None
    metrics: Metrics | None = None
    records: PassRecordFile | None = None
    profiler: PassProfiler | None = None


class EngineHost:
    """An engine in the calling thread, and a socket in an I/O thread.

    Args:
        target: the model to serve.
        limits: of what a device may request.
        context: of the socket.
        socket: where frames come from and go to.
        codec: of the frames.
        passes: budget of a forward pass, counters, a file with a line for every round, traces of some passes.
    """

    def __init__(
        self,
        target: TargetModel,
        limits: Limits,
        context: "zmq.Context[zmq.Socket[bytes]]",
        socket: FrameSocket,
        codec: FrameCodec,
        passes: PassOptions,
    ) -> None:
        self._context = context
        self._socket = socket
        self._codec = codec
        self._metrics = passes.metrics or Metrics()
        self._profiler = passes.profiler
        self._outbox, self._replies = self._reply_sockets()
        self._inbox = Inbox(limits.max_held_bytes)
        self._compiler = ThreadPoolExecutor(1, "grammar")
        options = (passes.budget or PassBudget(), self._deliver, self._metrics, passes.records)
        self._engine = Engine(target, limits, *options, run_elsewhere=self._run_elsewhere)
        self._stopping = threading.Event()
        self._stop_at = math.inf
        self._engine_beat = self._io_beat = time.monotonic()
        self._failure: Exception | None = None

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
        """Whether the engine and the I/O thread made progress in the last minute."""
        return time.monotonic() - min(self._engine_beat, self._io_beat) < _DEAD_SECONDS

    @property
    def draining(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stop_at < math.inf

    def receive(self, peer: Peer, frame: bytes, size: int) -> None:
        """Decode a frame and queue the engine's task for it; devices resend requests that are dropped."""
        try:
            request = self._codec.decode(frame)
        except ProtocolError as error:
            self._metrics.count_uplink(peer, None, size)
            self.refuse(peer, error)
            return
        task = partial(self._engine.receive, peer, request, size)
        if not self._inbox.put(task, peer.owner, held_bytes(request)):
            self._metrics.count_uplink(peer, None, size)

    def refuse(self, peer: Peer, error: EdgedraftError) -> None:
        """Answer a peer with a Fault that ends no session."""
        self._inbox.put(partial(self._engine.fault, peer, None, error), peer.owner)

    def revoke(self, device: EnrolledDevice) -> None:
        """End the sessions of a device whose key was revoked, after the requests that came before."""
        task = partial(self._engine.revoke, device.public_key, device.name, revocation())
        self._inbox.put(task, device.public_key, always=True)

    def _reply_sockets(self) -> "tuple[zmq.Socket[bytes], zmq.Socket[bytes]]":
        """Where the I/O thread receives replies, and where the engine sends them."""
        outbox, replies = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
        outbox.bind("inproc://replies")
        replies.connect("inproc://replies")
        return outbox, replies

    def _exchange_frames(self) -> None:
        poller = zmq.Poller()
        self._socket.register(poller)
        poller.register(self._outbox, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                self._io_beat = time.monotonic()
                ready = dict(poller.poll(_POLL_MS))
                if self._outbox in ready:
                    self._flush(Turn())
                self._socket.process(ready, self)
        except Exception as error:  # noqa: BLE001 - the thread in ``serve`` raises it
            self._failure = error
            self.stop()

    def _flush(self, turn: Turn) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                address, frame = self._outbox.recv_multipart(zmq.NOBLOCK)
                self._socket.send(address, frame)
                if not turn.spend(len(frame)):
                    return

    def _deliver(self, address: bytes, message: Message) -> int:
        frame = self._codec.encode(message)
        self._queue_reply([address, frame])
        return socket_bytes(frame, self._socket.envelope_bytes)

    def _queue_reply(self, parts: list[bytes]) -> None:
        """Hand a reply to the I/O thread, which empties the queue as long as it runs."""
        while True:
            try:
                self._replies.send_multipart(parts, zmq.NOBLOCK)
            except zmq.Again:
                if self._failure is not None:
                    return
                self._replies.poll(_POLL_MS, zmq.POLLOUT)
            else:
                return

    def _run_elsewhere(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        """Run ``work`` in the compiler's thread, then ``then`` in the engine's."""
        self._compiler.submit(work).add_done_callback(lambda _: self._inbox.put(then, always=True))

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
            self._engine_beat = time.monotonic()
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
        task = self._inbox.get(_DRAIN_POLL_SECONDS if self.draining else _IDLE_POLL_SECONDS)
        self._metrics.count_idle(time.monotonic() - start)
        return task
