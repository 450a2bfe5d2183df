"""The sample model over three ranks on logical nodes of Ray: the answers of one rank, also when a follower is lost."""

import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.setup.bench_setup import connected
from bench.setup.prompts import OWN_PROMPTS
from bench.setup.station_process import running_station
from device.drafting.draft_model import DraftModel
from device.planning.planners import Planners
from device.settings import DraftSettings, Timeouts
from device.text.tokenizer import Tokenizer
from protocol.messages import Mode, Sampling
from tests.cluster_station import (
    FOLLOWED_BY_SEED,
    START_SECONDS,
    AnsweringDevice,
    answering,
    cluster_station,
    kill,
    print_outages,
    wait_for_tokens,
)
from tests.sample import BUNDLE, SAMPLE
from tests.wait import wait_for

pytestmark = pytest.mark.model

TOKENS = 24
SETTINGS = [
    DraftSettings(Mode.IDS, Sampling(), 1, 4, drafts_ahead=0),
    DraftSettings(Mode.COUPLED, Sampling(1.0, seed=3), 1, 4, drafts_ahead=0),
    DraftSettings(Mode.TOPK, Sampling(1.0, seed=3), 32, 4, drafts_ahead=0),
    DraftSettings(Mode.TARGET, Sampling(1.0, seed=3), 1, 4),
]


def devices_of(address: str, stack: ExitStack) -> list[AnsweringDevice]:
    model = DraftModel(BUNDLE, threads=1)
    tokenizer = Tokenizer(BUNDLE, model.manifest)
    made, planners = [], Planners(model.manifest.quality)
    for settings in SETTINGS:
        own = DraftModel(BUNDLE, threads=1)
        setup = stack.enter_context(connected(own, tokenizer, address, planners, Timeouts(retry=START_SECONDS)))
        made.append(AnsweringDevice(setup, settings, OWN_PROMPTS[0], TOKENS))
    return made


def test_answers_on_three_ranks_are_those_of_one_and_survive_a_follower(tmp_path: Path) -> None:
    with ExitStack() as stack, running_station(str(SAMPLE), "float32", "--kv-memory", "256MiB") as address:
        expected = [device.answer() for device in devices_of(address, stack)]
    with ExitStack() as stack, cluster_station(tmp_path, replicas=1, ranks=3) as station:
        devices = devices_of(station.station.address, stack)
        assert [device.answer() for device in devices] == expected
        metrics = urllib.request.urlopen(f"{station.station.metrics_url}/metrics", timeout=5).read().decode()  # noqa: S310
        assert 'ranks="3"' in metrics
        before = [*station.followers, *station.processes.values()]
        assert len(before) == 3
        with answering(devices):
            lost = kill(station.followers[0])
            wait_for(lambda: not any(one.is_running() for one in before), START_SECONDS)
            wait_for_tokens(devices, time.time())
        print_outages(devices, {"a follower": lost})
        assert len(station.followers) == 2
        for device, answer in zip(devices, expected, strict=True):
            assert all(len(one) == len(answer) for one in device.answers)
            assert device.settings.mode not in FOLLOWED_BY_SEED or all(one == answer for one in device.answers)
