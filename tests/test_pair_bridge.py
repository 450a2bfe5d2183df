"""Answers with a draft model of another vocabulary are the target's own; `make test-pair` runs it.

SmolLM2-135M drafts, Qwen2.5-Coder-1.5B is the target.
"""

from collections.abc import Iterator

import pytest

from bench.exact import TargetAlone, differences
from bench.setup.bench_setup import BenchSetup
from bench.setup.prompts import OWN_PROMPTS
from bench.setup.station_process import running_station
from protocol.messages import Mode, Sampling
from tests.pair import DRAFT_LENS, pair_setup
from tests.random_sessions import check_random_sessions
from tests.sample import PAIR

pytestmark = [pytest.mark.pair, pytest.mark.timeout(7200)]

BRIDGE = PAIR / "bridge"
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def bridged() -> Iterator[BenchSetup]:
    with pair_setup(BRIDGE) as setup:
        yield setup


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=1)], ids=["greedy", "coupled"])
def test_answers_equal_those_of_the_target_alone(bridged: BenchSetup, sampling: Sampling) -> None:
    alone = TargetAlone(bridged, sampling)
    assert differences(bridged, alone, OWN_PROMPTS, NEW_TOKENS, sampling, DRAFT_LENS, lambda: None) == []


@pytest.mark.parametrize(
    ("target", "dtype", "weights"),
    [("draft", "float32", "dtype"), ("target", "bfloat16", "int8")],
    ids=["0.5B in float32", "1.5B in int8"],
)
def test_random_sessions_give_the_targets_answers(target: str, dtype: str, weights: str) -> None:
    with running_station(str(PAIR / target), dtype, "--weights", weights) as address:
        seen = check_random_sessions(BRIDGE, address, sessions=300)
    assert all(seen[mode] for mode in Mode)
    assert seen["breaks"] > 60
