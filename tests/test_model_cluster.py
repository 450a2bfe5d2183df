"""Replicas on logical nodes of Ray with the sample pair: losses, scaling, restarts; the answers stay the same."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest
from typer.testing import CliRunner

from basestation.cli import app
from bench.setup.bench_setup import connected
from bench.setup.prompts import OWN_PROMPTS
from device.drafting.draft_model import DraftModel
from device.planning.planners import Planners
from device.settings import DraftSettings
from device.text.tokenizer import Tokenizer
from protocol.messages import Mode, Sampling
from tests.cluster_station import (
    FOLLOWED_BY_SEED,
    AnsweringDevice,
    ClusterStation,
    answering,
    cluster_station,
    kill,
    print_outages,
    wait_for_tokens,
)
from tests.sample import BUNDLE

pytestmark = pytest.mark.model

TOKENS = 60
SETTINGS = [
    DraftSettings(Mode.IDS, Sampling(), 1, 4),
    DraftSettings(Mode.COUPLED, Sampling(1.0, seed=3), 1, 4),
    DraftSettings(Mode.TOPK, Sampling(1.0, seed=3), 32, 4),
    DraftSettings(Mode.TARGET, Sampling(1.0, seed=3), 1, 4),
]
FEW = 2
"""Devices where nothing is lost: replicas start sooner beside fewer."""


@pytest.fixture(scope="module")
def station(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterStation]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))  # where its control file is
        with cluster_station(tmp_path_factory.mktemp("records")) as station:
            yield station


@pytest.fixture(scope="module")
def devices(station: ClusterStation) -> Iterator[list[AnsweringDevice]]:
    with ExitStack() as stack:
        made = []
        for settings in SETTINGS:
            model = DraftModel(BUNDLE, threads=1)
            planners, tokenizer = Planners(model.manifest.quality), Tokenizer(BUNDLE, model.manifest)
            setup = stack.enter_context(connected(model, tokenizer, station.station.address, planners))
            made.append(AnsweringDevice(setup, settings, OWN_PROMPTS[0], TOKENS))
        yield made


@pytest.fixture(scope="module")
def undisturbed(devices: list[AnsweringDevice]) -> list[list[int]]:
    return [device.answer() for device in devices]


def check(devices: Sequence[AnsweringDevice], undisturbed: Sequence[list[int]]) -> None:
    """Each answer is the undisturbed one, or in the other modes at least as long."""
    for device, expected in zip(devices, undisturbed, strict=False):
        for answer in device.answers:
            assert len(answer) == len(expected)
            assert answer == expected or device.settings.mode not in FOLLOWED_BY_SEED, device.settings.mode


def moved(station: ClusterStation, since: float) -> list[list[str]]:
    """The replicas of each session that has been at several since then."""
    return [stays for stays in station.replicas_by_session(since).values() if len(stays) > 1]


def command(station: ClusterStation, *arguments: str) -> None:
    done = CliRunner().invoke(app, [*arguments, "--bind", station.station.address])
    assert done.exit_code == 0, done.output


def test_answers_survive_the_loss_of_each_replica_and_of_the_front(
    station: ClusterStation, devices: list[AnsweringDevice], undisturbed: list[list[int]]
) -> None:
    losses = {}
    with answering(devices):
        for name in sorted(station.serving):
            began = time.time()
            wait_for_tokens(devices, began)
            losses[name] = kill(station.processes[name])
            station.wait_for(lambda names, name=name: name not in names)  # type: ignore[misc]
            wait_for_tokens(devices, time.time())
            station.wait_for(lambda names: len(names) == 2)
            assert {stays[0] for stays in moved(station, began)} <= {name}
        began = time.time()
        wait_for_tokens(devices, began)
        losses["the front"] = kill(station.front)
        wait_for_tokens(devices, time.time())
    check(devices, undisturbed)
    print_outages(devices, losses)
    assert moved(station, began) == []


def test_scale_and_restart_move_no_session(
    station: ClusterStation, devices: list[AnsweringDevice], undisturbed: list[list[int]]
) -> None:
    began = time.time()
    with answering(devices[:FEW]):
        command(station, "scale", "1")
        station.wait_for(lambda names: len(names) == 1)
        before = station.serving
        command(station, "restart")
        station.wait_for(lambda names: len(names) == 1 and not names & before)
        command(station, "scale", "2")
        station.wait_for(lambda names: len(names) == 2)
    check(devices[:FEW], undisturbed)
    assert station.replicas_by_session(began)
    assert moved(station, began) == []


def test_replicas_leave_a_node_that_is_drained(
    station: ClusterStation, devices: list[AnsweringDevice], undisturbed: list[list[int]]
) -> None:
    began, before = time.time(), station.serving
    leaving = next(name for name in before if station.node_of(name))
    node = station.node_of(leaving)
    announce = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    which = ["--reason-message", "maintenance", "--address", station.nodes.address, "--node-id", node.node_id]
    with answering(devices[:FEW]):
        subprocess.run([*announce, *which], check=True, timeout=60)
        station.wait_for(lambda names: len(names) == 2 and leaving not in names)
        station.nodes.remove_node(node)
        wait_for_tokens(devices[:FEW], time.time())
    check(devices[:FEW], undisturbed)
    assert before - {leaving} < station.serving
    assert moved(station, began) == []


def test_answers_survive_the_loss_of_a_node(
    station: ClusterStation, devices: list[AnsweringDevice], undisturbed: list[list[int]]
) -> None:
    lost = next(name for name in station.serving if station.node_of(name))
    with answering(devices):
        when = time.time()
        station.nodes.remove_node(station.node_of(lost), allow_graceful=False)
        station.wait_for(lambda names: lost not in names)
        wait_for_tokens(devices, time.time())
    check(devices, undisturbed)
    print_outages(devices, {"a node": when})
