"""Answers of a real pair, draft and target of one family, are the target's own; `make test-pair` runs it."""

import logging
from collections.abc import Iterator

import pytest

from bench.exact import MAX_TIED_SHARE, Difference, Reference, TargetAlone, Transformers, differences
from bench.setup.bench_setup import BenchSetup
from bench.setup.prompts import OWN_PROMPTS
from protocol.messages import Sampling
from tests.pair import DRAFT_LENS, pair_setup
from tests.sample import PAIR

pytestmark = [pytest.mark.pair, pytest.mark.timeout(7200)]

NEW_TOKENS = 64


@pytest.fixture(scope="module")
def pair() -> Iterator[BenchSetup]:
    with pair_setup() as setup:
        yield setup


def differing(pair: BenchSetup, reference: Reference, sampling: Sampling) -> list[Difference]:
    """The answers that differ from the reference; each is logged."""
    found = differences(pair, reference, OWN_PROMPTS, NEW_TOKENS, sampling, DRAFT_LENS, lambda: None)
    logging.getLogger(__name__).warning("%d answers differ: %s", len(found), found)
    return found


def test_greedy_answers_equal_those_of_transformers_except_at_ties(pair: BenchSetup) -> None:
    found = differing(pair, Transformers(str(PAIR / "target")), Sampling())
    assert [difference for difference in found if not difference.is_tie] == []
    assert len({difference.prompt for difference in found}) <= MAX_TIED_SHARE * len(OWN_PROMPTS)


def test_coupled_answers_equal_the_targets_own_with_the_same_seed(pair: BenchSetup) -> None:
    sampling = Sampling(1.0, seed=1)
    assert differing(pair, TargetAlone(pair, sampling), sampling) == []
