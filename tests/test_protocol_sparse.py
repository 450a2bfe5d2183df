"""Sparse distributions: what is sent is what both ends have, in few bytes, and rubbish is refused."""

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

from device.draft_model import DraftModel
from device.drafter import Drafter
from device.sampling import Uplink
from protocol.bundle import Manifest
from protocol.draft_codec import decode_drafted, encode_drafted
from protocol.errors import FrameError
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import Draft, Mode, Sampling
from protocol.randomness import UNIFORM_BITS, Stream, random_bits
from protocol.sparse import MAX_STEPS, SparseDistribution
from tests.fakes import manifest

Probs = npt.NDArray[np.float64]
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
FALSE_ALARM = 1e-4


@st.composite
def rounded_distributions(draw: st.DrawFn) -> tuple[SparseDistribution, Probs]:
    """A distribution in steps, and the exact probabilities [V] it was rounded from."""
    vocab_size = draw(st.one_of(st.integers(2, 40), st.integers(41, 60_000)))
    count = draw(st.one_of(st.integers(1, min(vocab_size, 64)), st.just(vocab_size), st.integers(1, vocab_size)))
    steps = draw(st.one_of(st.integers(1, 2000), st.integers(1, MAX_STEPS), st.just(MAX_STEPS)))
    spread = draw(st.sampled_from([0.1, 1.0, 8.0, 30.0]))  # 30: most of them vanish
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    support = rng.permutation(vocab_size)[:count]
    weights = np.exp(rng.normal(0, spread, count))
    exact = np.zeros(vocab_size)
    exact[support] = weights / weights.sum()
    return SparseDistribution.quantize(vocab_size, support, exact[support], steps), exact


def sent(distribution: SparseDistribution) -> SparseDistribution:
    if distribution.whole:
        return SparseDistribution.decode_fp16(distribution.encode_fp16())
    packed = encode_drafted(distribution.support[:1].tolist(), [distribution])
    _, (arrived,) = decode_drafted(packed, distribution.vocab_size)
    return arrived


def of_weights(vocab_size: int, support: Sequence[int], weights: Sequence[int]) -> SparseDistribution:
    """Any distribution at all, also one that must not be sent."""
    return SparseDistribution(vocab_size, np.array(support), np.array(weights), sum(weights))


@given(rounded_distributions())
@relaxed
def test_what_arrives_equals_what_was_sent(case: tuple[SparseDistribution, Probs]) -> None:
    distribution, _ = case
    arrived = sent(distribution)
    assert arrived == distribution
    assert arrived.total == distribution.total == distribution.weights.sum()
    assert arrived.weights.dtype == np.int64


@given(rounded_distributions())
@relaxed
def test_rounding_moves_no_probability_by_a_step(case: tuple[SparseDistribution, Probs]) -> None:
    distribution, exact = case
    rounded = np.zeros(len(exact))
    rounded[distribution.support] = distribution.probs
    assert (np.abs(rounded - exact) * distribution.total < 1 + 1e-6).all()
    assert (distribution.weights >= 1).all()
    assert (exact[distribution.support] > 0).all()


@given(st.lists(st.integers(0, 100), min_size=1, max_size=4).filter(any), st.integers(1, 12))
@relaxed
def test_no_distribution_in_as_many_steps_is_nearer(parts: list[int], steps: int) -> None:
    exact = np.array(parts) / sum(parts)
    rounded = np.zeros(len(parts))
    distribution = SparseDistribution.quantize(len(parts), np.arange(len(parts)), exact, steps)
    rounded[distribution.support] = distribution.probs
    candidates = (np.array(one) for one in product(range(steps + 1), repeat=len(parts)) if sum(one) == steps)
    nearest = min(np.abs(one / steps - exact).sum() for one in candidates)
    assert np.abs(rounded - exact).sum() <= nearest + 1e-9


@given(st.integers(2, 3000), st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 8.0]))
@relaxed
def test_a_whole_distribution_keeps_the_precision_of_fp16(vocab_size: int, seed: int, spread: float) -> None:
    exact = np.exp(np.random.default_rng(seed).normal(0, spread, vocab_size))
    exact /= exact.sum()
    whole = SparseDistribution.quantize_fp16(exact)
    assert len(whole) == vocab_size
    assert (np.abs(whole.weights * 2.0**-24 - exact) <= exact * 2**-11 + 2.0**-25).all()
    assert sent(whole) == whole
    assert len(whole.encode_fp16()) == 2 * vocab_size


def test_probabilities_that_come_to_no_step_leave_the_support_unless_all_are_kept() -> None:
    probs = np.array([1e-9, 1 - 1e-9])
    assert SparseDistribution.quantize(3, np.array([2, 0]), probs, MAX_STEPS).support.tolist() == [0]
    assert SparseDistribution.quantize_fp16(probs).weights.tolist() == [0, 2**24]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.5, 1.001, 2.0, 65_504.0])
def test_only_probabilities_from_0_to_1_are_taken(bad: float) -> None:
    assert SparseDistribution.decode_fp16(np.array([1.0, 0.0], "<f2").tobytes()).weights.tolist() == [2**24, 0]
    with pytest.raises(FrameError, match=r"probability"):
        SparseDistribution.decode_fp16(np.array([0.5, bad], "<f2").tobytes())


def test_all_probabilities_0_are_refused() -> None:
    with pytest.raises(FrameError, match="every probability is 0"):
        SparseDistribution.decode_fp16(bytes(2 * 5))


def test_samples_are_as_frequent_as_probable() -> None:
    probs = np.random.default_rng(3).dirichlet(np.full(12, 0.5))
    distribution = SparseDistribution.quantize(50, np.arange(4, 40, 3), probs, 200)
    counts = np.zeros(50)
    for position in range(20_000):
        counts[distribution.sample(random_bits(1, position, Stream.DRAFT))] += 1
    expected = 20_000 * np.array([distribution.probability(token_id) for token_id in range(50)])
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
def test_a_sampled_token_is_never_impossible(case: tuple[SparseDistribution, Probs], bits: int) -> None:
    distribution, _ = case
    token_id = distribution.sample(bits)
    assert distribution.probability(token_id) > 0
    assert token_id in distribution.support


def test_each_token_is_as_long_as_its_probability_says() -> None:
    distribution = of_weights(9, [1, 4, 7], [1, 2, 1])
    quarter = 2 ** (UNIFORM_BITS - 2)
    edges = [0, quarter - 1, quarter, 3 * quarter - 1, 3 * quarter, 4 * quarter - 1]
    assert [distribution.sample(bits) for bits in edges] == [1, 1, 4, 4, 7, 7]
    assert [distribution.probability(token_id) for token_id in (0, 1, 4, 7, 8)] == [0, 0.25, 0.5, 0.25, 0]


def test_entries_of_probability_0_are_never_sampled_where_all_tokens_are_kept() -> None:
    distribution = SparseDistribution.quantize_fp16(np.array([0, 0.5, 0, 0]))
    assert {distribution.sample(bits) for bits in (0, 1, 2**UNIFORM_BITS - 1)} == {1}


@dataclass
class WideModel:
    """20 000 tokens, every other time half of them a little likelier than the rest: rounded, all are alike."""

    manifest: Manifest = field(default_factory=lambda: manifest(20_000))
    length: int = 0

    def forward(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        self.length += len(token_ids)
        return logits_after(self.length)

    def rollback(self, length: int) -> None:
        self.length = length


def logits_after(length: int) -> npt.NDArray[np.float32]:
    if length % 2:  # a distribution with a shape, so that another one sent in its place shows
        return np.random.default_rng(length).normal(0, 1, 20_000).astype(np.float32)
    units = np.repeat([838.6, 2 * 2**24 / 20_000 - 838.6], 10_000)  # of 2⁻²⁴: both round to 839
    logits: npt.NDArray[np.float32] = np.roll(np.log(units), length).astype(np.float32)
    return logits


def unrounded_sample(length: int, bits: int) -> int:
    """What a device that rounds only what it sends would have drawn."""
    weights = np.exp(logits_after(length).astype(np.float64))
    return int(np.searchsorted(np.cumsum(weights / weights.sum()), bits * 2.0**-UNIFORM_BITS, side="right"))


@pytest.mark.parametrize(
    ("mode", "uplink"),
    [(Mode.FULL, Uplink(1, 1.0, 1)), (Mode.TOPK, Uplink(20_000, 1.0, 20_000)), (Mode.TOPP, Uplink(5000, 0.5, 5000))],
    ids=["full", "topk", "topp"],
)
def test_invariant_1_the_device_samples_from_what_the_bytes_say(mode: Mode, uplink: Uplink) -> None:
    prompt, draft_len, codec, differs = [1, 2], 8, FrameCodec(20_000, Limits(max_uplink_k=20_000)), 0
    for seed in range(3):
        model = cast(DraftModel, WideModel())
        drafted = Drafter(model, mode, Sampling(1.0, seed=seed), uplink).draft(prompt, draft_len)
        arrived = codec.decode(codec.encode(Draft(0, 1, drafted.token_ids, drafted.distributions)))
        assert isinstance(arrived, Draft)
        assert arrived.token_ids == drafted.token_ids
        assert arrived.distributions == drafted.distributions
        for index, (token_id, distribution) in enumerate(zip(drafted.token_ids, drafted.distributions, strict=True)):
            bits = random_bits(seed, len(prompt) + index, Stream.DRAFT)
            assert token_id == sent(distribution).sample(bits)
            differs += token_id != unrounded_sample(len(prompt) + index, bits)
    assert differs > 0, "the case has no teeth: rounding never changed a token"
