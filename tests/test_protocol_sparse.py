"""Quantized distributions: both ends have the same one, rounding is minimal, and invalid bytes are refused."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from device.drafting.draft_model import DraftModel
from device.drafting.drafter import Drafter
from device.settings import UplinkSettings
from protocol.bundle import Manifest
from protocol.draft_codec import decode_drafted, encode_drafted
from protocol.errors import FrameError
from protocol.frames import FrameCodec
from protocol.full_distribution import FullDistribution
from protocol.limits import Limits
from protocol.messages import Draft, Mode, Sampling
from protocol.randomness import UNIFORM_BITS, Stream, random_bits
from protocol.sparse import MAX_STEPS, SparseDistribution
from tests.fakes import manifest
from tests.p_values import FALSE_ALARM
from tests.slow_verify import dense

Probs = npt.NDArray[np.float64]
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def rounded_distributions(draw: st.DrawFn) -> tuple[SparseDistribution, Probs]:
    """A quantized distribution, and the exact probabilities [V] that it was rounded from."""
    vocab_size = draw(st.one_of(st.integers(2, 40), st.integers(41, 60_000)))
    count = draw(st.one_of(st.integers(1, min(vocab_size, 64)), st.just(vocab_size), st.integers(1, vocab_size)))
    steps = draw(st.one_of(st.integers(1, 2000), st.integers(1, MAX_STEPS), st.just(MAX_STEPS)))
    spread = draw(st.sampled_from([0.1, 1.0, 8.0, 30.0]))  # at 30 most of them round to 0
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    support = rng.permutation(vocab_size)[:count]
    weights = np.exp(rng.normal(0, spread, count))
    exact = np.zeros(vocab_size)
    exact[support] = weights / weights.sum()
    return SparseDistribution.quantize(vocab_size, support, exact[support], steps), exact


def decoded(distribution: SparseDistribution) -> SparseDistribution:
    encoded = encode_drafted(distribution.support[:1].tolist(), [distribution])
    _, (received,) = decode_drafted(encoded, distribution.vocab_size)
    return received


def of_weights(vocab_size: int, support: Sequence[int], weights: Sequence[int]) -> SparseDistribution:
    """A distribution with given weights, without quantization."""
    return SparseDistribution(vocab_size, np.array(support), np.array(weights), sum(weights))


@given(rounded_distributions())
@relaxed
def test_distributions_round_trip(case: tuple[SparseDistribution, Probs]) -> None:
    distribution, _ = case
    received = decoded(distribution)
    assert received == distribution
    assert received.total == distribution.total == distribution.weights.sum()
    assert received.weights.dtype == np.int64


@given(rounded_distributions())
@relaxed
def test_rounding_changes_each_probability_by_less_than_a_step(case: tuple[SparseDistribution, Probs]) -> None:
    distribution, exact = case
    rounded = np.zeros(len(exact))
    rounded[distribution.support] = distribution.probs
    assert (np.abs(rounded - exact) * distribution.total < 1 + 1e-6).all()
    assert (distribution.weights >= 1).all()
    assert (exact[distribution.support] > 0).all()


@given(st.lists(st.integers(0, 100), min_size=1, max_size=4).filter(any), st.integers(1, 12))
@relaxed
def test_no_distribution_with_the_same_steps_is_nearer(parts: list[int], steps: int) -> None:
    exact = np.array(parts) / sum(parts)
    rounded = np.zeros(len(parts))
    distribution = SparseDistribution.quantize(len(parts), np.arange(len(parts)), exact, steps)
    rounded[distribution.support] = distribution.probs
    candidates = (np.array(one) for one in product(range(steps + 1), repeat=len(parts)) if sum(one) == steps)
    nearest = min(np.abs(one / steps - exact).sum() for one in candidates)
    assert np.abs(rounded - exact).sum() <= nearest + 1e-9


@given(st.integers(2, 3000), st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 8.0]))
@relaxed
def test_a_full_distribution_has_the_precision_of_fp16(vocab_size: int, seed: int, spread: float) -> None:
    exact = np.exp(np.random.default_rng(seed).normal(0, spread, vocab_size))
    exact /= exact.sum()
    full = FullDistribution.quantize(exact)
    assert len(full) == vocab_size
    assert (np.abs(full.weights * 2.0**-24 - exact) <= exact * 2**-11 + 2.0**-25).all()
    assert FullDistribution.decode(full.encode(), vocab_size) == (full,)
    assert len(full.encode()) == 2 * vocab_size


def test_probabilities_that_round_to_0_leave_the_support_of_sparse_distributions_only() -> None:
    probs = np.array([1e-9, 1 - 1e-9])
    assert SparseDistribution.quantize(3, np.array([2, 0]), probs, MAX_STEPS).support.tolist() == [0]
    assert FullDistribution.quantize(probs).weights.tolist() == [0, 2**24]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.5, 1.001, 2.0, 65_504.0])
def test_probabilities_outside_0_to_1_are_refused(bad: float) -> None:
    assert FullDistribution.decode(np.array([1.0, 0.0], "<f2").tobytes(), 2)[0].weights.tolist() == [2**24, 0]
    with pytest.raises(FrameError, match=r"probability"):
        FullDistribution.decode(np.array([0.5, bad], "<f2").tobytes(), 2)


def test_a_distribution_of_zeros_is_refused() -> None:
    with pytest.raises(FrameError, match="all probabilities"):
        FullDistribution.decode(bytes(2 * 5), 5)


def test_samples_follow_the_distribution() -> None:
    probs = np.random.default_rng(3).dirichlet(np.full(12, 0.5))
    distribution = SparseDistribution.quantize(50, np.arange(4, 40, 3), probs, 200)
    counts = np.zeros(50)
    for position in range(20_000):
        counts[distribution.sample(random_bits(1, position, Stream.DRAFT))] += 1
    expected = 20_000 * dense(distribution)
    common = expected >= 5
    assert (
        chisquare(
            np.append(counts[common], counts[~common].sum() + 1),
            np.append(expected[common], expected[~common].sum() + 1),
        ).pvalue
        > FALSE_ALARM
    )


@given(rounded_distributions(), st.integers(0, 2**UNIFORM_BITS - 1) | st.sampled_from([0, 2**UNIFORM_BITS - 1]))
@relaxed
def test_a_sampled_token_has_positive_probability(case: tuple[SparseDistribution, Probs], bits: int) -> None:
    distribution, _ = case
    token_id = distribution.sample(bits)
    assert token_id in distribution.support


def test_sampling_inverts_the_cumulative_distribution() -> None:
    distribution = of_weights(9, [1, 4, 7], [1, 2, 1])
    quarter = 2 ** (UNIFORM_BITS - 2)
    edges = [0, quarter - 1, quarter, 3 * quarter - 1, 3 * quarter, 4 * quarter - 1]
    assert [distribution.sample(bits) for bits in edges] == [1, 1, 4, 4, 7, 7]
    assert dense(distribution).tolist() == [0, 0.25, 0, 0, 0.5, 0, 0, 0.25, 0]


def test_entries_of_probability_0_in_full_distributions_are_never_sampled() -> None:
    distribution = FullDistribution.quantize(np.array([0, 0.5, 0, 0]))
    assert {distribution.sample(bits) for bits in (0, 1, 2**UNIFORM_BITS - 1)} == {1}


@dataclass
class WideModel:
    """20 000 tokens; at every other position, half of them are slightly more likely, and rounding makes all equal."""

    manifest: Manifest = field(default_factory=lambda: manifest(20_000))
    token_ids: list[int] = field(default_factory=list)
    forked_length: int = 0

    @property
    def length(self) -> int:
        return len(self.token_ids)

    def forward(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        self.token_ids += token_ids
        return logits_after(len(self.token_ids))

    def rollback(self, length: int) -> None:
        del self.token_ids[length:]


def logits_after(length: int) -> npt.NDArray[np.float32]:
    if length % 2:  # a distinct distribution, so that a wrong one is detected
        return np.random.default_rng(length).normal(0, 1, 20_000).astype(np.float32)
    units = np.repeat([838.6, 2 * 2**24 / 20_000 - 838.6], 10_000)  # in units of 2⁻²⁴; both round to 839
    logits: npt.NDArray[np.float32] = np.roll(np.log(units), length).astype(np.float32)
    return logits


def unrounded_sample(length: int, bits: int) -> int:
    """The sample of a device that draws from unrounded probabilities."""
    weights = np.exp(logits_after(length).astype(np.float64))
    return int(np.searchsorted(np.cumsum(weights / weights.sum()), bits * 2.0**-UNIFORM_BITS, side="right"))


@pytest.mark.parametrize(
    ("mode", "uplink"),
    [
        (Mode.FULL, UplinkSettings(1, 1.0, 1)),
        (Mode.TOPK, UplinkSettings(20_000, 1.0, 20_000)),
        (Mode.TOPP, UplinkSettings(5000, 0.5, 5000)),
    ],
    ids=["full", "topk", "topp"],
)
def test_invariant_1_the_device_samples_from_the_decoded_distribution(mode: Mode, uplink: UplinkSettings) -> None:
    prompt, draft_len, codec, differs = [1, 2], 8, FrameCodec(20_000, Limits(max_uplink_k=20_000)), 0
    for seed in range(3):
        model = cast(DraftModel, WideModel())
        drafted = Drafter(model, mode, Sampling(1.0, seed=seed), uplink).draft(prompt, draft_len)
        received = codec.decode(codec.encode(Draft(0, 1, drafted.token_ids, drafted.distributions)))
        assert isinstance(received, Draft)
        assert received.token_ids == drafted.token_ids
        assert received.distributions == drafted.distributions
        for index, (token_id, arrived) in enumerate(zip(drafted.token_ids, received.distributions, strict=True)):
            bits = random_bits(seed, len(prompt) + index, Stream.DRAFT)
            assert token_id == arrived.sample(bits)
            differs += token_id != unrounded_sample(len(prompt) + index, bits)
    assert differs > 0, "rounding never changed a token, so the test proves nothing"
