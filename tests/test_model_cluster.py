"""Two replicas on two logical nodes of Ray with the sample pair: every loss in turn, and the answers stay the same."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from bench.setup.bench_setup import BenchSetup, bench_setup
from bench.setup.prompts import OWN_PROMPTS
from bench.setup.server_process import serving
from bench.setup.station_process import station_command
from device.settings import DraftSettings
from protocol.messages import Mode, Sampling
from tests.sample import BUNDLE, SAMPLE
from tests.wait import wait_for

pytestmark = pytest.mark.model

TOKENS = 120
SETTINGS = {
    Mode.IDS: DraftSettings(Mode.IDS, Sampling(), 1, 4),
    Mode.COUPLED: DraftSettings(Mode.COUPLED, Sampling(1.0, seed=3), 1, 4),
    Mode.TOPK: DraftSettings(Mode.TOPK, Sampling(1.0, seed=3), 32, 4),
    Mode.TARGET: DraftSettings(Mode.TARGET, Sampling(1.0, seed=3), 1, 4),
}
FOLLOWED_BY_SEED = (Mode.IDS, Mode.COUPLED, Mode.TARGET)
"""In the other modes an answer depends on where its rounds begin."""
STORE_BYTES = 100_000_000


@dataclass
class Station:
    """A base station with two replicas, each on a node of its own."""

    address: str
    process: psutil.Process
    nodes: Any

    @property
    def replicas(self) -> set[int]:
        """The process ids of the replicas."""
        return {one.pid for one in psutil.Process().children(recursive=True) if _name(one).startswith("ray::Replica")}

    @property
    def front(self) -> int:
        return next(one.pid for one in self.process.children() if "spawn_main" in _name(one))

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@contextmanager
def two_nodes() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def station() -> Iterator[Station]:
    with two_nodes() as nodes:
        options = ["--replicas", "2", "--ray-address", nodes.address, "--replica-cpus", "1"]
        command = [*station_command(str(SAMPLE), "float32"), "--kv-memory", "256MiB", *options]
        with serving(command) as served:
            station = Station(served.address, psutil.Process(served.process.pid), nodes)
            wait_for(lambda: len(station.replicas) == 2, 60)
            yield station


@pytest.fixture(scope="module")
def setup(station: Station) -> Iterator[BenchSetup]:
    with bench_setup(BUNDLE, station.address) as ready:
        yield ready


def disturbed(setup: BenchSetup, settings: DraftSettings, losses: dict[int, Callable[[], None]]) -> list[int]:
    """An answer, with each loss while the round after a number of tokens is under way."""
    session, tokens = setup.session(settings, setup.prompt_ids(OWN_PROMPTS[0])), list[int]()
    running = list[threading.Thread]()
    for token in session.answer(TOKENS):
        tokens.append(token.token_id)
        if loss := losses.get(len(tokens)):
            running.append(threading.Thread(target=loss))
            running[-1].start()
    for thread in running:
        thread.join()
    session.close()
    return tokens


@pytest.mark.parametrize("mode", list(SETTINGS), ids=str)
def test_an_answer_survives_the_loss_of_each_replica_and_of_the_front(
    station: Station, setup: BenchSetup, mode: Mode
) -> None:
    settings = SETTINGS[mode]
    undisturbed = disturbed(setup, settings, {})
    wait_for(lambda: len(station.replicas) == 2, 60)
    first, second = station.replicas

    def lose_second() -> None:
        wait_for(lambda: len(station.replicas - {second}) == 1, 60)
        station.kill(second)

    losses = {10: lambda: station.kill(first), 40: lose_second, 70: lambda: station.kill(station.front)}
    answer = disturbed(setup, settings, losses)
    assert len(answer) == len(undisturbed)
    assert answer == undisturbed or mode not in FOLLOWED_BY_SEED


def test_an_answer_survives_the_removal_of_a_node(station: Station, setup: BenchSetup) -> None:
    settings = SETTINGS[Mode.COUPLED]
    undisturbed = disturbed(setup, settings, {})
    wait_for(lambda: len(station.replicas) == 2, 60)
    worker = next(iter(station.nodes.worker_nodes))
    losses = {10: lambda: station.nodes.remove_node(worker, allow_graceful=False)}
    assert disturbed(setup, settings, losses) == undisturbed
