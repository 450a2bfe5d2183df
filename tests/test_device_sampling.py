"""The distribution that a draft token is sampled from, against a slow implementation of its definition."""

import numpy as np
import numpy.typing as npt
import pytest

from device.drafting.sampling import full_distribution, sparse_distribution
from device.settings import UplinkSettings, choose_mode
from protocol.bundle import QualityFigures
from protocol.errors import SettingsError
from protocol.messages import Mode, Sampling
from protocol.sparse import MAX_STEPS, SparseDistribution
from tests.slow_verify import dense

VOCAB = 50
RESOLUTION = 1 / MAX_STEPS


@pytest.mark.parametrize(
    ("temperature", "topk", "coupled", "mode"),
    [
        (0, 0.9, 0.1, Mode.IDS),
        (1, 0.86, 0.95, Mode.COUPLED),
        (1, 0.64, 0.60, Mode.COUPLED),  # topk's gain is not worth its bytes
        (1, 0.64, 0.55, Mode.TOPK),
    ],
)
def test_auto_selects_topk_only_where_it_accepts_enough_more(
    temperature: float, topk: float, coupled: float, mode: Mode
) -> None:
    quality = QualityFigures(0.9, 0.9, topk_acceptance=topk, coupled_acceptance=coupled, positions=1)
    assert choose_mode(quality, Sampling(temperature)) is mode


def finest(uplink_k: int, uplink_p: float = 1.0) -> UplinkSettings:
    """The finest quantisation that can be sent."""
    return UplinkSettings(uplink_k, uplink_p, MAX_STEPS)


def logits_of(seed: int, vocab_size: int = VOCAB) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 2, vocab_size).astype(np.float32)


def slow_distribution(logits: npt.NDArray[np.float32], sampling: Sampling, uplink_k: int) -> dict[int, float]:
    """The definition, token by token: sort, truncate, renormalise."""
    order = sorted(range(len(logits)), key=lambda token_id: -logits[token_id])
    kept = order[: min(uplink_k, sampling.top_k or len(logits))]
    weights = [
        float(np.exp((float(logits[token_id]) - float(logits[kept[0]])) / sampling.temperature)) for token_id in kept
    ]
    if sampling.top_p < 1:
        total, mass = sum(weights), 0.0
        for index, weight in enumerate(weights):
            mass += weight / total
            if mass >= sampling.top_p:
                kept, weights = kept[: index + 1], weights[: index + 1]
                break
    return {token_id: weight / sum(weights) for token_id, weight in zip(kept, weights, strict=True)}


def assert_equal(distribution: SparseDistribution, expected: dict[int, float]) -> None:
    """Compare entry by entry, to the resolution of ``finest``."""
    sendable = {token_id for token_id, probability in expected.items() if probability > RESOLUTION}
    support = set(distribution.support.tolist())
    assert sendable <= support <= set(expected)
    for token_id in support:
        assert dense(distribution)[token_id] == pytest.approx(expected[token_id], rel=0, abs=RESOLUTION)
    assert distribution.probs.sum() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("uplink_k", [1, 2, 7, VOCAB - 1, VOCAB])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.5),
        Sampling(3.0),
        Sampling(1.0, top_k=5),
        Sampling(1.0, top_p=0.8),
        Sampling(0.7, top_k=5, top_p=0.6),
        Sampling(1.0, top_k=1000),
        Sampling(1.0, top_p=1e-9),
    ],
    ids=str,
)
def test_sparse_distribution_equals_its_definition(seed: int, uplink_k: int, sampling: Sampling) -> None:
    logits = logits_of(seed)
    assert_equal(sparse_distribution(logits, sampling, finest(uplink_k)), slow_distribution(logits, sampling, uplink_k))


@pytest.mark.parametrize("uplink_k", [1, 3, 10])
def test_top_k_entries_are_kept_and_renormalised(uplink_k: int) -> None:
    logits = logits_of(1)
    distribution = sparse_distribution(logits, Sampling(1.0), finest(uplink_k))
    assert distribution.support.tolist() == sorted(np.argsort(-logits)[:uplink_k].tolist())
    probs = np.exp(logits.astype(np.float64))[distribution.support]
    assert distribution.probs == pytest.approx(probs / probs.sum(), rel=2**-10)


def test_uplink_k_of_the_vocabulary_size_or_more_keeps_all_tokens() -> None:
    for uplink_k in (VOCAB, VOCAB + 1, 10**6):
        distribution = sparse_distribution(logits_of(2), Sampling(1.0), finest(uplink_k))
        assert distribution.support.tolist() == list(range(VOCAB))


def test_temperature_divides_the_logits() -> None:
    logits = np.log(np.array([0.2, 0.5, 0.3], np.float32))
    assert sparse_distribution(logits, Sampling(1.0), finest(3)).probs == pytest.approx([0.2, 0.5, 0.3], rel=2**-10)
    assert sparse_distribution(logits, Sampling(0.5), finest(3)).probs == pytest.approx(
        [0.04 / 0.38, 0.25 / 0.38, 0.09 / 0.38], rel=2**-10
    )


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = np.log(np.array([0.3, 0.5, 0.15, 0.05], np.float32))
    for top_p, support in ((0.4, [1]), (0.6, [0, 1]), (0.79, [0, 1]), (0.81, [0, 1, 2]), (0.99, [0, 1, 2, 3])):
        assert sparse_distribution(logits, Sampling(1.0, top_p=top_p), finest(4)).support.tolist() == support


def test_top_p_applies_to_the_kept_entries() -> None:
    logits = np.log(np.array([0.3, 0.5, 0.15, 0.05], np.float32))
    distribution = sparse_distribution(logits, Sampling(1.0, top_p=0.6), finest(2))
    assert distribution.support.tolist() == [1]  # 0.5 of 0.8 is 0.625


@pytest.mark.parametrize("uplink_k", [1, 5, VOCAB])
def test_temperature_0_gives_the_argmax_probability_one(uplink_k: int) -> None:
    logits = logits_of(3)
    distribution = sparse_distribution(logits, Sampling(0.0, top_k=4, top_p=0.5), finest(uplink_k))
    assert distribution.support.tolist() == [int(logits.argmax())]
    assert distribution.probs.tolist() == [1.0]


def test_temperature_0_resolves_ties_to_the_lowest_id() -> None:
    assert sparse_distribution(np.array([0, 2, 2, 1], np.float32), Sampling(), finest(4)).support.tolist() == [1]


def test_top_k_entries_are_kept_of_a_large_vocabulary() -> None:
    logits = logits_of(4, 49_152)
    distribution = sparse_distribution(logits, Sampling(1.0), finest(32))
    assert distribution.support.tolist() == sorted(np.argsort(-logits)[:32].tolist())


def test_masked_tokens_have_probability_zero() -> None:
    logits = logits_of(5)
    logits[10:] = -np.inf
    for uplink_k in (4, 20, VOCAB):
        distribution = sparse_distribution(logits, Sampling(1.0), finest(uplink_k))
        assert distribution.probs[distribution.support >= 10].sum() == 0


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 1e-308, 5e-324])
def test_tiny_temperature_gives_the_argmax_or_is_refused(temperature: float) -> None:
    logits = logits_of(6) + 10
    try:
        sampling = Sampling(temperature)
    except SettingsError:
        return
    for uplink_k in (4, VOCAB):
        distribution = sparse_distribution(logits, sampling, finest(uplink_k))
        assert dense(distribution)[logits.argmax()] == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(2.0, top_k=20), Sampling(2.0, top_p=0.7)], ids=str)
@pytest.mark.parametrize("uplink_p", [1e-9, 0.3, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("uplink_k", [1, 5, VOCAB, 10**6])
def test_topp_keeps_the_smallest_set_of_most_likely_tokens_that_reaches_p(
    seed: int, sampling: Sampling, uplink_p: float, uplink_k: int
) -> None:
    ordered = list(slow_distribution(logits_of(seed), sampling, VOCAB).items())
    total, kept = 0.0, {}
    for token_id, probability in ordered[:uplink_k]:
        if total >= uplink_p:
            break
        kept[token_id] = probability
        total += probability
    expected = {token_id: probability / total for token_id, probability in kept.items()}
    assert_equal(sparse_distribution(logits_of(seed), sampling, finest(uplink_k, uplink_p)), expected)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, top_k=5, top_p=0.6)], ids=str)
def test_full_distribution_has_all_tokens_in_fp16(sampling: Sampling) -> None:
    distribution = full_distribution(logits_of(7), sampling)
    expected = slow_distribution(logits_of(7), Sampling(1.0, top_k=1) if sampling.greedy else sampling, VOCAB)
    assert distribution.support.tolist() == list(range(VOCAB))
    for token_id in range(VOCAB):
        assert distribution.probability(token_id) == pytest.approx(expected.get(token_id, 0), rel=2**-10, abs=2.0**-24)


def test_steps_default_to_the_modes() -> None:
    assert UplinkSettings.of_mode(Mode.TOPK, 32, 0.5, 0) == UplinkSettings(32, 1.0, 768)
    assert UplinkSettings.of_mode(Mode.TOPP, 256, 0.5, 0) == UplinkSettings(256, 0.5, 4096)
    assert UplinkSettings.of_mode(Mode.TOPK, 32, 0.5, 10) == UplinkSettings(32, 1.0, 10)
    assert UplinkSettings.of_mode(Mode.TOPK, 10**7, 0.5, 0).steps == MAX_STEPS


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ((0, 0.5, 1), "uplink-k is 0; allowed: 1 or more"),
        ((1, 0.0, 1), "uplink-p is 0.0; allowed: above 0"),
        ((1, 1.1, 1), "uplink-p is 1.1; allowed: above 0"),
        ((1, float("nan"), 1), "uplink-p is nan; allowed: above 0"),
        ((1, 0.5, -1), "uplink-steps is -1; allowed: 1 to 16777216"),
        ((1, 0.5, 2**24 + 1), "uplink-steps is 16777217; allowed: 1 to 16777216"),
    ],
)
def test_invalid_uplink_settings_are_refused(values: tuple[int, float, int], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        UplinkSettings(*values)
