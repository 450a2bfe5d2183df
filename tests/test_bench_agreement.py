"""Teacher-forced agreement, with table-driven models."""

import numpy as np
import pytest

from bench.pair.agreement import agreement_rows, agreements
from protocol.messages import Sampling
from tests.fakes import FakeDraftModel, FakeTarget, random_table
from tests.vocabulary_pairs import TARGET_SIZE, TARGET_TEXTS, bridged, similar_table

TABLE = random_table(TARGET_SIZE, seed=1)
PROMPT = [1, 2, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_model_equal_to_the_target_always_agrees_and_another_sometimes(temperature: float) -> None:
    sampling, target = Sampling(temperature, seed=3), FakeTarget.make(TABLE)
    assert agreements(FakeDraftModel.make(TABLE), target, PROMPT, sampling, 40) == [True] * 40
    bridge, _ = bridged(len(TARGET_TEXTS), similar_table(TABLE, len(TARGET_TEXTS)))
    assert 0.1 < np.mean(agreements(bridge, target, PROMPT, sampling, 200)) < 0.95


def test_the_text_ends_with_the_targets_stop_id() -> None:
    first = int(TABLE[PROMPT[-2], PROMPT[-1]].argmax())
    target = FakeTarget.make(TABLE, frozenset({first}))
    assert len(agreements(FakeDraftModel.make(TABLE), target, PROMPT, Sampling(), 40)) == 1


def test_all_tokens_count_alike_whatever_their_category() -> None:
    rows = agreement_rows({"coding": [True, True, True], "math": [False]}, Sampling())
    assert [(row["category"], row["tokens"], row["agreement"]) for row in rows] == [
        ("coding", 3, 1.0),
        ("math", 1, 0.0),
        ("all", 4, 0.75),
    ]
