"""A front and its replicas with fake targets, in threads of the test, over real sockets."""

import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe

from basestation.devices.device_socket import Admission
from basestation.devices.key_folder import KeyFolder
from basestation.engine.engine_host import PassOptions
from basestation.logs import LogFormat
from basestation.replicas.front import Front, FrontOptions
from basestation.replicas.front_metrics import FrontMetrics
from basestation.replicas.front_process import FrontSettings
from basestation.replicas.inner_link import InnerKey
from basestation.replicas.replica import Replica
from basestation.replicas.replica_settings import ReplicaOptions
from basestation.target.target_model import TargetModel
from protocol.limits import Limits
from tests.fakes import TARGET, FakeTarget
from tests.serving import ANY_PORT
from tests.wait import wait_for


class RunningReplica(Replica):
    """A replica in a thread of its own, which counts the sessions that were opened."""

    def __init__(self, target: TargetModel, options: ReplicaOptions, limits: Limits) -> None:
        super().__init__(target, limits, options, PassOptions())
        self.name = options.name
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    @property
    def open_sessions(self) -> int:
        return len(self.load.sessions)

    def kill(self) -> None:
        """End without a word to anybody, as a killed process does."""
        self._engine.close = lambda: None  # type: ignore[method-assign]
        self._stopping.set()
        self._inbox.wake()
        self.thread.join()


@dataclass
class FrontSite:
    """A front that can be replaced by another at the same addresses, and the replicas behind it."""

    options: FrontOptions
    admission: Admission
    cleanup: ExitStack = field(default_factory=ExitStack)
    replicas: dict[str, RunningReplica] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    """The names of the replicas that the front told of."""
    refused: dict[str, str] = field(default_factory=dict)
    """The replicas that the front refused, and why."""
    metrics: FrontMetrics = field(default_factory=FrontMetrics)

    @property
    def address(self) -> str:
        return self.options.bind

    def start_front(self) -> None:
        self._serving = threading.Event()
        told = self._note_address, self._note_replicas, self.refused.__setitem__
        self.front = Front(self.options, self.admission, self.metrics, *told)
        self._commands, front_end = Pipe()
        self.front.watch(front_end.fileno(), lambda: self.front.drain(*front_end.recv()))
        self._front_end = front_end  # closed with the front
        self.options = replace(self.options, inner_bind=self.front.inner_address)
        self._thread = threading.Thread(target=self.front.serve, daemon=True)
        self._thread.start()

    def stop_front(self) -> None:
        self.front.stop()
        self._thread.join()
        self._commands.close()
        self._front_end.close()

    def drain(self, drain_seconds: float, name: str | None = None) -> None:
        """Call ``drain`` in the front's thread."""
        self._commands.send((drain_seconds, name))
        wait_for(lambda: not self._front_end.poll())

    def restart_front(self) -> None:
        self.stop_front()
        self.start_front()

    def start_replica(self, name: str, target: TargetModel, key: InnerKey | None = None) -> RunningReplica:
        link = ReplicaOptions(
            name, self.options.inner_bind, key or self.options.inner_key, self.admission.keys is not None
        )
        self.replicas[name] = replica = RunningReplica(target, link, self.options.limits)
        self.cleanup.callback(self._stop_replica, replica)
        return replica

    def wait_for_replicas(self, count: int) -> None:
        wait_for(lambda: len(self.front.routing.replicas) == count)
        assert self._serving.wait(5)

    def _note_address(self, address: str) -> None:
        self.options = replace(self.options, bind=address)
        self._serving.set()

    def _note_replicas(self, names: Collection[str]) -> None:
        self.told = set(names)

    @staticmethod
    def _stop_replica(replica: RunningReplica) -> None:
        replica.stop()
        replica.thread.join()


@contextmanager
def front_site(limits: Limits | None = None, keys: KeyFolder | None = None, expected: int = 2) -> Iterator[FrontSite]:
    options = FrontOptions(ANY_PORT, ANY_PORT, InnerKey.new(), expected, limits or Limits())
    site = FrontSite(options, Admission(keys))
    with site.cleanup:
        site.start_front()
        site.cleanup.callback(site.stop_front)
        yield site


@contextmanager
def two_replicas() -> Iterator[FrontSite]:
    with front_site() as site:
        for name in ("replica-0", "replica-1"):
            site.start_replica(name, FakeTarget.make(TARGET))
        site.wait_for_replicas(2)
        yield site


def front_settings(metrics_bind: str | None = None) -> FrontSettings:
    """Of a front for one replica in a process of its own."""
    listening = FrontOptions(ANY_PORT, ANY_PORT, InnerKey.new(), 1, Limits())
    return FrontSettings(listening, "table", None, False, 2**30, metrics_bind, LogFormat.TEXT)


def start_replica(
    settings: FrontSettings, address: str, name: str, model: TargetModel, cleanup: ExitStack
) -> RunningReplica:
    """Start a replica of a front that listens at ``address``."""
    options = ReplicaOptions(name, address, settings.front.inner_key, keyed=False)
    replica = RunningReplica(model, options, settings.front.limits)
    cleanup.callback(replica.thread.join)
    cleanup.callback(replica.stop)
    return replica
