"""The front in a process of its own, which is started again whenever it ends.

A hostile enrolled device can make libzmq end its process. Sessions are at the replicas,
so that costs all devices less than a second; the device is then quarantined.
"""

import logging
import math
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from prometheus_client import disable_created_metrics

from basestation.descriptors import raise_descriptor_limit
from basestation.devices.device_socket import Admission
from basestation.devices.key_folder import KeyFolder
from basestation.devices.quarantine import HandshakeLog, Quarantine
from basestation.kv_cache.memory_guard import MemoryGuard
from basestation.logs import LogFormat, start_logging
from basestation.monitoring.monitor import Monitor
from basestation.replicas.front import Front, FrontOptions
from basestation.replicas.front_metrics import FrontMetrics
from protocol.errors import EdgedraftError, LinkError

logger = logging.getLogger(__name__)

_START_SECONDS = 30.0
_SHORT_SECONDS = 1.0
_PAUSE_SECONDS = 0.2
"""Before a front that ended at once is started again."""


@dataclass(frozen=True)
class FrontSettings:
    """What a front's process is given.

    Attributes:
        front: where it listens.
        model: named in the log.
        keys: of the enrolled devices.
        insecure: admit every device without them.
        peer_bytes: memory for what peers send.
        metrics_bind: of the fleet page.
        log_format: of its log.
        quarantined: until when which keys are refused.
        drain_by: when the time is over that a front before it was told to drain in; infinite where none was.
    """

    front: FrontOptions
    model: str
    keys: KeyFolder | None
    insecure: bool
    peer_bytes: int
    metrics_bind: str | None
    log_format: LogFormat
    quarantined: Mapping[str, float] = field(default_factory=dict)
    drain_by: float = math.inf


RunFront: TypeAlias = Callable[[FrontSettings, Connection], None]


class FrontProcess:
    """A front that is always there, until it has drained or is stopped.

    Args:
        settings: of the front; ports 0 are replaced by the ports that the first one gets.
        run: what the child does, like ``run_front``.
    """

    def __init__(self, settings: FrontSettings, run: RunFront | None = None) -> None:
        self._settings = settings
        self._run_front = run or run_front
        self._quarantine = Quarantine()
        self._context = multiprocessing.get_context("spawn")
        self._listening, self._serving = threading.Event(), threading.Event()
        self._failure: EdgedraftError | None = None
        self._stopping = False
        self._drain_by = math.inf
        self._expected = settings.front.replicas
        self._replicas: Collection[str] = ()
        self._refused: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._supervise, name="front", daemon=True)
        self.pid: int | None = None

    def start(self) -> str:
        """Start the front; returns the endpoint for replicas.

        Raises:
            EdgedraftError: it does not start.
        """
        self._thread.start()
        self._wait(self._listening)
        return self.inner_address

    def address(self, seconds: float) -> str:
        """The endpoint for devices, once a replica has reported.

        Raises:
            EdgedraftError: it cannot serve, or does not within ``seconds``.
        """
        self._wait(self._serving, seconds)
        return self.bind

    @property
    def inner_address(self) -> str:
        """The endpoint for replicas; its port is known once it has started."""
        return self._settings.front.inner_bind

    @property
    def serving(self) -> bool:
        """Whether it has served devices."""
        return self._serving.is_set()

    @property
    def bind(self) -> str:
        """The endpoint for devices; its port is known once it has served."""
        return self._settings.front.bind

    @property
    def replicas(self) -> Collection[str]:
        """The names of the replicas that the front sends sessions to."""
        return self._replicas

    def refused(self) -> Iterator[tuple[str, str]]:
        """The replicas that the front has refused since the last call, each with the reason."""
        with suppress(queue.Empty):
            while True:
                yield self._refused.get_nowait()

    @property
    def running(self) -> bool:
        """Whether a front runs or is about to be started again."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        """Whether it was told to drain."""
        return self._drain_by < math.inf

    @property
    def failure(self) -> EdgedraftError | None:
        """Why it cannot run, None if it can."""
        return self._failure

    def expect(self, replicas: int) -> None:
        """How many replicas the next front waits for."""
        self._expected = replicas

    def drain(self, drain_seconds: float, name: str | None = None) -> None:
        """Let the sessions of the replica with that name finish, or with None of all; the front then ends."""
        if name is None:
            self._drain_by = min(self._drain_by, time.monotonic() + drain_seconds)
        self._tell("drain", drain_seconds, name)

    def close(self) -> None:
        """Stop the front."""
        self._stopping = True
        self._tell("stop")
        self._thread.join()

    def _tell(self, *command: object) -> None:
        with suppress(OSError):  # it has ended
            if self._connection:
                self._connection.send(command)

    def _wait(self, event: threading.Event, seconds: float = _START_SECONDS) -> None:
        event.wait(seconds)
        if self._failure:
            raise self._failure
        if not event.is_set():
            raise LinkError(f"the front did not start within {seconds:.0f} s")

    def _supervise(self) -> None:
        while not self._stopping:
            began = time.monotonic()
            exit_code = self._run()
            if self._stopping or self._failure or self._has_drained(exit_code):
                break
            logger.error("the front ended with exit code %s; it is started again", exit_code)
            if exit_code == -signal.SIGABRT:
                self._note_abort()
            if time.monotonic() - began < _SHORT_SECONDS:
                time.sleep(_PAUSE_SECONDS)
        self._listening.set()
        self._serving.set()

    def _has_drained(self, exit_code: int | None) -> bool:
        return self.draining and (exit_code == 0 or time.monotonic() >= self._drain_by)

    def _run(self) -> int | None:
        """Run one front until it ends."""
        self._connection, child_end = self._context.Pipe()  # commands that come from now on are in it
        if self._stopping:
            return None
        front = replace(self._settings.front, replicas=self._expected)
        arguments = (replace(self._settings, front=front, drain_by=self._drain_by), child_end)
        process = self._context.Process(target=self._run_front, args=arguments, name="front", daemon=True)
        process.start()
        self.pid = process.pid
        child_end.close()
        with suppress(EOFError, ConnectionError):
            while True:
                self._hear(*self._connection.recv())
        process.join()
        self._replicas = ()
        return process.exitcode

    def _hear(self, what: str, value: Any) -> None:
        front = self._settings.front
        match what:
            case "handshake":
                self._quarantine.note_handshake(value)
            case "replicas":
                self._replicas = value
            case "refused":
                self._refused.put(value)
            case "listening":
                self._settings = replace(self._settings, front=replace(front, inner_bind=value))
                self._listening.set()
            case "serving":
                self._settings = replace(self._settings, front=replace(front, bind=value))
                self._serving.set()
            case "failed":
                if not self._serving.is_set():
                    self._failure = value
                    self._listening.set()
                    self._serving.set()

    def _note_abort(self) -> None:
        for key in self._quarantine.note_abort():
            logger.error("device key %s is quarantined: the front was aborted twice at its handshakes; revoke it", key)
        self._settings = replace(self._settings, quarantined=self._quarantine.deadlines())


def run_front(settings: FrontSettings, connection: Connection) -> None:
    """What the child process does: run a front, and tell the parent of addresses, replicas, handshakes and failures."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent says when to end
    start_logging(settings.log_format)
    raise_descriptor_limit()
    disable_created_metrics()  # type: ignore[no-untyped-call]
    try:
        with ExitStack() as stack:
            _serve(settings, connection, stack)
    except EdgedraftError as error:
        logger.error("%s", error)  # noqa: TRY400 - the message contains the reason
        connection.send(("failed", error))
        raise SystemExit(error.exit_code) from error


def _serve(settings: FrontSettings, connection: Connection, stack: ExitStack) -> None:
    metrics = FrontMetrics()
    monitor = None
    if settings.metrics_bind:
        monitor = stack.enter_context(closing(Monitor(settings.metrics_bind, metrics, settings.keys)))
        logger.info("fleet page at %s/, metrics at %s/metrics", monitor.url, monitor.url)
    handshakes = HandshakeLog(lambda key: connection.send(("handshake", key)), settings.quarantined)
    guard = MemoryGuard.of_process(0, settings.peer_bytes)
    admission = Admission(settings.keys, settings.insecure, guard, handshakes)

    def tell_address(address: str) -> None:
        logger.info("serving %s at %s", settings.model, address)
        connection.send(("serving", address))

    def tell_replicas(names: Collection[str]) -> None:
        connection.send(("replicas", names))

    def tell_refused(name: str, reason: str) -> None:
        connection.send(("refused", (name, reason)))

    front = Front(settings.front, admission, metrics, tell_address, tell_replicas, tell_refused)
    if monitor:
        monitor.alive, monitor.ready = (lambda: front.alive), (lambda: front.ready)
    if settings.drain_by < math.inf:
        front.drain(max(0.0, settings.drain_by - time.monotonic()))
    front.watch(connection.fileno(), lambda: _obey(front, connection))
    connection.send(("listening", front.inner_address))
    front.serve()


def _obey(front: Front, connection: Connection) -> None:
    """Do what the parent says; a parent that is gone ends the front."""
    try:
        command: tuple[Any, ...] = connection.recv()
    except (EOFError, ConnectionError):
        command = ("stop",)
    match command:
        case ("drain", drain_seconds, name):
            front.drain(drain_seconds, name)
        case ("stop",):
            front.stop()
