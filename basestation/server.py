"""The socket of the base station: frames in, frames out, and a queue to the engine each way.

The socket's thread never touches the model and the engine's thread never
touches the socket: frames are taken and checked while a pass runs, and a slow
peer delays no pass.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import zmq

from basestation.engine import Engine, Peer
from basestation.target_model import TargetModel
from protocol.errors import FrameError, LinkError
from protocol.frames import FrameCodec, FrameLimits
from protocol.messages import Message

logger = logging.getLogger(__name__)

_POLL_MS = 200
_LINGER_MS = 500
_IDLE_SECONDS = 5.0
_HEARTBEAT_MS = 5000


@dataclass(frozen=True)
class _Arrival:
    peer: Peer
    message: Message | FrameError


class Server:
    """A ROUTER socket in a thread of its own, and the engine behind it.

    Args:
        target: the model to serve.
        bind: a ZeroMQ endpoint, ``tcp://127.0.0.1:5755``; port 0 takes a free one.
        limits: what frames may hold.

    Raises:
        LinkError: the address cannot be bound.
    """

    def __init__(self, target: TargetModel, bind: str, limits: FrameLimits | None = None) -> None:
        limits = limits or FrameLimits()
        self._codec = FrameCodec(target.vocabulary.size, limits)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._bind(bind)
        self._outbox = self._context.socket(zmq.PULL)
        self._outbox.bind("inproc://replies")
        self._replies = self._context.socket(zmq.PUSH)
        self._replies.connect("inproc://replies")
        self._inbox: queue.SimpleQueue[_Arrival | None] = queue.SimpleQueue()
        self._engine = Engine(target, limits, self._deliver)
        self._stopping = threading.Event()
        self._failure: Exception | None = None

    @property
    def address(self) -> str:
        """The endpoint that devices connect to."""
        return self._router.getsockopt_string(zmq.LAST_ENDPOINT)

    def serve(self) -> None:
        """Serve until ``stop`` is called or a thread fails.

        The engine runs in the calling thread, which should be the one that
        loaded the target: each thread that computes with PyTorch gets a pool of
        its own, and two pools on the same cores halve each other's speed.
        """
        postman = threading.Thread(target=self._exchange_frames, name="socket", daemon=True)
        postman.start()
        try:
            self._run_engine()
        finally:
            self.stop()
            postman.join()
            self._flush()
            self._context.destroy(linger=_LINGER_MS)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Make ``serve`` return soon; may be called from another thread or a signal handler."""
        self._stopping.set()
        self._inbox.put(None)

    def _bind(self, bind: str) -> "zmq.Socket[bytes]":
        router = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.ROUTER_HANDOVER, 1),
            (zmq.MAXMSGSIZE, self._codec.max_frame_bytes),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.LINGER, _LINGER_MS),
        ):
            router.setsockopt(option, value)
        try:
            router.bind(bind)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise LinkError(f"cannot bind {bind!r}: {error}; name a free address like tcp://127.0.0.1:5755") from error
        return router

    def _exchange_frames(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._outbox, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                ready = dict(poller.poll(_POLL_MS))
                if self._outbox in ready:
                    self._flush()
                if self._router in ready:
                    self._take_frames()
        except Exception as error:  # noqa: BLE001 - handed to the thread that serves, which raises it
            self._failure = error
            self.stop()

    def _flush(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._router.send_multipart(self._outbox.recv_multipart(zmq.NOBLOCK), zmq.NOBLOCK)

    def _take_frames(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                peer, *parts = self._router.recv_multipart(zmq.NOBLOCK)
                self._inbox.put(_Arrival(peer, self._decode(parts)))

    def _decode(self, parts: list[bytes]) -> Message | FrameError:
        if len(parts) != 1:
            return FrameError(f"a message of {len(parts)} ZeroMQ frames; allowed: 1")
        try:
            return self._codec.decode(parts[0])
        except FrameError as error:
            return error

    def _deliver(self, peer: Peer, message: Message) -> None:
        self._replies.send_multipart([peer, self._codec.encode(message)])

    def _run_engine(self) -> None:
        while not self._stopping.is_set():
            for arrival in self._arrivals():
                self._take(arrival)
            self._engine.step()
            self._engine.drop_idle()
        self._engine.close()

    def _arrivals(self) -> Iterator[_Arrival]:
        """All that has arrived; waits for the first where the engine has nothing else to do."""
        block = not self._engine.busy
        with contextlib.suppress(queue.Empty):
            while (arrival := self._inbox.get(block, _IDLE_SECONDS)) is not None:
                yield arrival
                block = False

    def _take(self, arrival: _Arrival) -> None:
        if isinstance(arrival.message, FrameError):
            self._engine.fault(arrival.peer, None, arrival.message)
        else:
            self._engine.receive(arrival.peer, arrival.message)
