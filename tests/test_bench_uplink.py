"""Bytes and acceptance of every mode on the same positions, with fake models."""

import numpy as np
import pytest

from bench.uplink.modes import UPLINK_P, check_uplink_k, uplink_rows
from bench.uplink.positions import DRAFT_LEN, Corpus, collect
from protocol.errors import SettingsError
from protocol.messages import Sampling
from tests.fakes import FakeDraftModel, FakeTarget, blend

VOCAB = 300


def corpus(temperature: float) -> Corpus:
    rng = np.random.default_rng(3)
    one, other = (rng.normal(0, 1.5, (VOCAB, VOCAB)).astype(np.float32) for _ in range(2))
    table, draft = (np.broadcast_to(array, (VOCAB, VOCAB, VOCAB)) for array in (one, blend(one, other, 0.8)))
    model, target = FakeDraftModel.make(draft), FakeTarget.make(table)
    return collect(model, target, [[1, 2], [3, 4]], 2, Sampling(temperature, seed=1), lambda: None)


def test_more_entries_raise_acceptance_and_bytes() -> None:
    positions = corpus(1.0)
    rows = {row["case"]: row for row in uplink_rows(positions, [1, 8, 64, VOCAB])}
    assert list(rows)[:2] == ["target", "coupled"]
    assert len(positions.positions) == 4 * DRAFT_LEN
    topk = [rows[name] for name in ("topk 1", "topk 8", "topk 64", "topk V")]
    assert [row["acceptance"] for row in topk] == sorted(row["acceptance"] for row in topk)  # type: ignore[type-var]
    assert [row["bytes_per_token"] for row in topk] == sorted(row["bytes_per_token"] for row in topk)  # type: ignore[type-var]
    assert all(f"topp {p:g}" in rows for p in UPLINK_P)


def test_full_acceptance_is_one_minus_the_total_variation() -> None:
    positions = corpus(1.0)
    overlaps = []
    for one in positions.positions:
        weights = np.exp(one.logits.astype(np.float64))
        overlaps.append(1 - np.abs(weights / weights.sum() - one.target_probs).sum() / 2)
    rows = {row["case"]: row for row in uplink_rows(positions, [VOCAB])}
    assert rows["full"]["acceptance"] == pytest.approx(np.mean(overlaps), abs=1e-3)
    assert rows["topk V"]["acceptance"] == pytest.approx(np.mean(overlaps), abs=0.02)
    coupled = rows["coupled"]["acceptance"]
    assert isinstance(coupled, float)
    assert np.mean([one / (2 - one) for one in overlaps]) - 0.1 < coupled < np.mean(overlaps) + 0.1


def test_all_modes_have_the_same_acceptance_at_temperature_zero() -> None:
    rows = uplink_rows(corpus(0.0), [1, 64])
    assert rows[1]["case"] == "ids"
    assert len({row["acceptance"] for row in rows[1:]}) == 1
    assert {row["entries"] for row in rows if str(row["case"]).startswith("topk")} == {1}


@pytest.mark.parametrize("uplink_k", [0, VOCAB + 1])
def test_uplink_k_outside_the_vocabulary_is_refused(uplink_k: int) -> None:
    with pytest.raises(SettingsError, match=r"^uplink_k is "):
        check_uplink_k([3, uplink_k], VOCAB)
