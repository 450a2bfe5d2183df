"""Processes that send each frame back: a replica without an engine, and a base station without one.

What they cost is what the inner link and the devices' socket cost.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, TypeAlias

import psutil
import zmq

from basestation.devices.device_socket import Admission, DeviceSocket
from basestation.devices.key_folder import EnrolledDevice, KeyFolder
from basestation.devices.peer import Peer
from basestation.engine.load import Load, SessionKey
from basestation.monitoring.metrics import Metrics
from basestation.replicas.front_link import FrontLink
from basestation.replicas.replica_settings import ReplicaOptions
from basestation.target.served_target import ServedTarget
from basestation.target.vocabulary import Vocabulary
from bench.setup.cores import running_on
from protocol.errors import EdgedraftError
from protocol.frames import FrameCodec
from protocol.limits import Limits

if TYPE_CHECKING:
    from basestation.engine.engine_host import FrameSocket  # imports PyTorch

VOCAB = 49_152
LIMITS = Limits(max_requests_per_second=10**7, max_bytes_per_second=2**31 - 1)
_POLL_MS = 100
_START_SECONDS = 60

RunEcho: TypeAlias = Callable[[Connection], None]


@dataclass
class _OpenSessions:
    """What a replica without an engine reports."""

    load: Load
    draining: bool = False

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Nothing runs."""


@dataclass
class _Echo:
    """A receiver that sends each frame back."""

    socket: "FrameSocket"

    def receive(self, peer: Peer, frame: bytes, size: int) -> None:
        self.socket.send(peer.address, frame)

    def refuse(self, peer: Peer, error: EdgedraftError) -> None:
        """The peer gets no answer, and the benchmark fewer frames."""

    def revoke(self, device: EnrolledDevice) -> None:
        """No key is revoked here."""

    def serve(self, connection: Connection) -> None:
        """Echo until the parent says anything."""
        poller = zmq.Poller()
        self.socket.register(poller)
        poller.register(connection.fileno(), zmq.POLLIN)
        while True:
            ready = dict(poller.poll(_POLL_MS))
            if connection.fileno() in ready:
                return
            self.socket.process(ready, self)


@dataclass(frozen=True)
class EchoReplica:
    """The far end of a front's inner link; it says that these sessions are open."""

    options: ReplicaOptions
    sessions: Sequence[SessionKey]

    def __call__(self, connection: Connection) -> None:
        """Run in the child process."""
        tokens = {f"t{number}": number for number in range(VOCAB)}
        target = ServedTarget("echo", 4096, Vocabulary(tokens, VOCAB, frozenset()), has_grammars=False)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        link = FrontLink(context, self.options, target, Metrics())
        link.engine = _OpenSessions(Load(self.sessions))
        connection.send(self.options.front)
        _Echo(link).serve(connection)
        context.destroy(linger=0)


@dataclass(frozen=True)
class EchoStation:
    """The devices' socket of a base station in one process."""

    keys: KeyFolder

    def __call__(self, connection: Connection) -> None:
        """Run in the child process."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        size = FrameCodec(VOCAB, LIMITS).max_frame_bytes
        socket = DeviceSocket(context, "tcp://127.0.0.1:0", size, LIMITS, Admission(self.keys), Metrics())
        connection.send(socket.address)
        _Echo(socket).serve(connection)
        context.destroy(linger=0)


@dataclass(frozen=True)
class EchoProcess:
    """A running echo: the address it listens at or connects to, and its process."""

    address: str
    process: psutil.Process


@contextmanager
def echo_process(run: RunEcho, core: int) -> Iterator[EchoProcess]:
    """Run an echo on one core."""
    context = multiprocessing.get_context("spawn")
    connection, child_end = context.Pipe()
    child = context.Process(target=run, args=(child_end,), daemon=True)
    with running_on(core):
        child.start()
    with closing(connection):
        try:
            assert connection.poll(_START_SECONDS), "the echo did not start"
            assert child.pid
            yield EchoProcess(connection.recv(), psutil.Process(child.pid))
        finally:
            with suppress(OSError):
                connection.send("stop")
            child.join()
