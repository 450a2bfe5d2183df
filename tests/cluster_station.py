"""A base station with replicas on logical nodes of Ray, and devices that answer all the time."""

import json
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.setup.bench_setup import BenchSetup
from bench.setup.station_process import StationProcess, replica_names, station_process
from device.settings import DraftSettings
from protocol.messages import Mode
from tests.sample import SAMPLE
from tests.wait import wait_for

STORE_BYTES = 100_000_000
DRAIN_SECONDS = 60
START_SECONDS = 90
FOLLOWED_BY_SEED = (Mode.IDS, Mode.COUPLED, Mode.TARGET)
"""In the other modes an answer depends on where its rounds begin, which a loss changes."""


@dataclass
class ClusterStation:
    """A base station with replicas, each, or each rank of them, on a logical node of its own.

    Attributes:
        station: the process that ``serve`` runs in.
        nodes: of Ray.
        folder: where replicas record their rounds.
    """

    station: StationProcess
    nodes: Any
    folder: Path

    @property
    def serving(self) -> set[str]:
        """The replicas whose metrics the front has; none while it is started again."""
        return replica_names(self.station.metrics_url)

    @property
    def processes(self) -> dict[str, psutil.Process]:
        """The process of each replica: the one that writes its records."""
        found = [one for one in psutil.Process().children(recursive=True) if _command(one).startswith("ray::Replica")]
        return {Path(file.path).suffixes[0][1:]: one for one in found for file in _records(one)}

    @property
    def followers(self) -> list[psutil.Process]:
        return [one for one in psutil.Process().children(recursive=True) if _command(one).startswith("ray::Follower")]

    @property
    def front(self) -> psutil.Process:
        children = psutil.Process(self.station.pid).children()
        return next(one for one in children if "spawn_main" in _command(one))

    def node_of(self, name: str) -> Any:
        """The node where a replica runs; None if it is the head."""
        raylet = self.processes[name].ppid()
        nodes = self.nodes.worker_nodes
        return next((one for one in nodes if one.all_processes["raylet"][0].process.pid == raylet), None)

    def wait_for(self, is_reached: Callable[[set[str]], bool]) -> None:
        """Wait until the serving replicas are as they should be."""
        wait_for(lambda: is_reached(self.serving), START_SECONDS)

    def replicas_by_session(self, since: float) -> dict[tuple[str, int], list[str]]:
        """The replicas that verified rounds of each session since then, by time, each once per stay."""
        rows = [
            (row["time"], (row["device"], row["session"]), path.suffixes[0][1:])
            for path in self.folder.glob("rounds.*.jsonl")
            for row in map(json.loads, path.read_text().splitlines())
            if row["time"] > since
        ]
        stays = defaultdict[tuple[str, int], list[str]](list)
        for _, session, name in sorted(rows):
            if stays[session][-1:] != [name]:
                stays[session].append(name)
        return stays


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _records(process: psutil.Process) -> list[Any]:
    try:
        return [file for file in process.open_files() if Path(file.path).name.startswith("rounds.")]
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def kill(process: psutil.Process) -> float:
    """Kill a process; returns when."""
    when = time.time()
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not _command(process))
    return when


@contextmanager
def nodes_of_ray(workers: int) -> Iterator[Any]:
    """A head and workers, each with one core."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(workers):
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        yield cluster
    finally:
        cluster.shutdown()


@contextmanager
def cluster_station(folder: Path, replicas: int = 2, ranks: int = 1) -> Iterator[ClusterStation]:
    """A base station with replicas of the sample model on three nodes."""
    with nodes_of_ray(workers=2) as nodes:
        cluster = ["--ray-address", nodes.address, "--replica-cpus", "1"]
        processes = ["--replicas", str(replicas), "--tensor-parallel", str(ranks)]
        passes = ["--kv-memory", "256MiB", "--drain-seconds", str(DRAIN_SECONDS)]
        records = ["--record", str(folder / "rounds.jsonl")]
        with station_process(str(SAMPLE), "float32", [*cluster, *processes, *passes, *records]) as started:
            station = ClusterStation(started, nodes, folder)
            station.wait_for(lambda names: len(names) == replicas)
            yield station


@dataclass
class AnsweringDevice:
    """A device that answers a prompt over and over.

    Attributes:
        setup: its draft model and its link.
        settings: of its answers.
        prompt: of its answers.
        tokens: of an answer.
        answers: so far.
        times: when each token came.
    """

    setup: BenchSetup
    settings: DraftSettings
    prompt: str
    tokens: int
    answers: list[list[int]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def answer(self) -> list[int]:
        session = self.setup.session(self.settings, self.setup.prompt_ids(self.prompt))
        answer = list[int]()
        for token in session.answer(self.tokens):
            answer.append(token.token_id)
            self.times.append(time.time())
        session.close()
        return answer

    def answer_until(self, stop: threading.Event) -> None:
        while not stop.is_set():
            self.answers.append(self.answer())

    def seconds_until_token(self, since: float) -> float:
        return min(one for one in self.times if one > since) - since


@contextmanager
def answering(devices: Sequence[AnsweringDevice]) -> Iterator[None]:
    """Let all devices answer, each at least once."""
    stop = threading.Event()
    for device in devices:
        device.answers.clear()
        device.times.clear()
    with ThreadPoolExecutor(len(devices)) as pool:
        running = [pool.submit(device.answer_until, stop) for device in devices]
        try:
            wait_for_tokens(devices, 0.0)
            yield
        finally:
            stop.set()
    for one in running:
        one.result()


def wait_for_tokens(devices: Sequence[AnsweringDevice], since: float) -> None:
    """Wait until each device has got a token since then."""
    wait_for(lambda: all(device.times and device.times[-1] > since for device in devices), START_SECONDS)


def print_outages(devices: Sequence[AnsweringDevice], losses: Mapping[str, float]) -> None:
    for name, when in losses.items():
        seconds = max(device.seconds_until_token(when) for device in devices)
        print(f"after the loss of {name} the last of {len(devices)} devices went on within {seconds:.2f} s")
