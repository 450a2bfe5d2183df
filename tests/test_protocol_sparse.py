"""Sparse distributions: what is sent is what both ends have, in few bytes, and rubbish is refused."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from device.draft_model import DraftModel
from device.drafter import Drafter
from protocol.bundle import Manifest
from protocol.errors import FrameError
from protocol.frames import FrameCodec
from protocol.messages import Draft, Mode, Sampling
from protocol.randomness import UNIFORM_BITS, Stream, random_bits
from protocol.sparse import SparseDistribution
from tests.fakes import manifest

Probs = npt.NDArray[np.float64]
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
FALSE_ALARM = 1e-4
SMALLEST_HALF = 2.0**-24


@st.composite
def rounded_distributions(draw: st.DrawFn) -> tuple[SparseDistribution, Probs]:
    """A distribution, and the exact probabilities [V] it was rounded from."""
    vocab_size = draw(st.one_of(st.integers(2, 40), st.integers(41, 60_000)))
    count = draw(st.one_of(st.integers(1, min(vocab_size, 64)), st.just(vocab_size), st.integers(1, vocab_size)))
    spread = draw(st.sampled_from([0.1, 1.0, 8.0, 30.0]))  # 30: most of them vanish in FP16
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    support = rng.permutation(vocab_size)[:count]
    weights = np.exp(rng.normal(0, spread, count))
    exact = np.zeros(vocab_size)
    exact[support] = weights / weights.sum()
    return SparseDistribution.round_off(vocab_size, support, exact[support]), exact


def sent(distribution: SparseDistribution) -> SparseDistribution:
    return SparseDistribution.decode(distribution.encode(), distribution.vocab_size, len(distribution))


def of_weights(vocab_size: int, support: Sequence[int], weights: Sequence[int]) -> SparseDistribution:
    """Any distribution at all, also one that must not be sent."""
    return SparseDistribution(vocab_size, np.array(support), np.array(weights), sum(weights))


@given(rounded_distributions())
@relaxed
def test_what_arrives_equals_what_was_sent(case: tuple[SparseDistribution, Probs]) -> None:
    distribution, _ = case
    arrived = sent(distribution)
    assert arrived == distribution
    assert arrived.total == distribution.total
    assert arrived.encode() == distribution.encode()


@given(rounded_distributions())
@relaxed
def test_rounding_keeps_each_probability_to_the_precision_of_fp16(case: tuple[SparseDistribution, Probs]) -> None:
    distribution, exact = case
    whole = len(distribution) == distribution.vocab_size
    vanished = np.setdiff1d(np.flatnonzero(exact), distribution.support)
    assert (exact[vanished] <= SMALLEST_HALF / 2).all()
    assert (distribution.weights >= (0 if whole else 1)).all()
    kept = exact[distribution.support]
    assert (np.abs(distribution.weights * SMALLEST_HALF - kept) <= kept * 2**-11 + SMALLEST_HALF / 2).all()
    assert distribution.probs.sum() == pytest.approx(1)


def test_probabilities_that_vanish_in_fp16_leave_the_support_unless_all_are_kept() -> None:
    probs = np.array([1e-9, 1 - 1e-9])
    assert SparseDistribution.round_off(3, np.array([2, 0]), probs).support.tolist() == [0]
    assert SparseDistribution.round_off(2, np.array([1, 0]), probs).weights.tolist() == [2**24, 0]


@pytest.mark.parametrize(
    ("vocab_size", "count"),
    [(2, 1), (1000, 1), (32_000, 64), (49_152, 8), (49_152, 32), (49_152, 128), (128_256, 32), (151_936, 1)],
)
def test_the_support_takes_little_more_than_its_information(vocab_size: int, count: int) -> None:
    support = np.random.default_rng(count).choice(vocab_size, count, replace=False)
    distribution = SparseDistribution.round_off(vocab_size, support, np.full(count, 1 / count))
    bound = (comb(vocab_size, count) - 1).bit_length() / 8
    assert bound <= len(distribution.encode()) - 2 * count <= 1.05 * bound + 2


def test_32_of_49152_tokens_take_at_most_116_bytes() -> None:
    for support in (np.arange(32), np.arange(49_152 - 32, 49_152), np.arange(32) * 1536):
        assert len(SparseDistribution.round_off(49_152, support, np.full(32, 1 / 32)).encode()) <= 116


@given(st.data())
@settings(relaxed, max_examples=500)
def test_any_bytes_are_a_distribution_or_a_frame_error(data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(2, 300))
    count = data.draw(st.integers(-1, vocab_size + 1) | st.just(2**62))
    kept = min(max(count, 1), vocab_size)
    length = len(SparseDistribution.round_off(vocab_size, np.arange(kept), np.full(kept, 1 / kept)).encode())
    frame = data.draw(st.binary(min_size=length, max_size=length) | st.binary(max_size=2 * length))
    try:
        decoded = SparseDistribution.decode(frame, vocab_size, count)
    except FrameError:
        return
    assert len(decoded) == count
    assert decoded.support.tolist() == sorted(set(decoded.support.tolist()))
    assert 0 <= decoded.support[0] <= decoded.support[-1] < vocab_size
    assert sent(decoded) == decoded


@given(st.data())
@settings(relaxed, max_examples=300)
def test_a_damaged_distribution_is_another_one_or_a_frame_error(data: st.DataObject) -> None:
    support = data.draw(st.lists(st.integers(0, 999), min_size=1, max_size=20, unique=True))
    honest = SparseDistribution.round_off(1000, np.array(support), np.full(len(support), 1 / len(support)))
    frame = bytearray(honest.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decoded = SparseDistribution.decode(bytes(frame), 1000, len(support))
    except FrameError:
        return
    assert sent(decoded) == decoded


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.5, 1.001, 2.0, 65_504.0, 0.0])
def test_only_probabilities_above_0_and_up_to_1_are_taken(bad: float) -> None:
    honest = SparseDistribution.round_off(100, np.array([3, 70]), np.array([0.5, 0.5])).encode()
    head = honest[:-4]
    assert len(SparseDistribution.decode(head + np.array([1.0, 0.5], "<f2").tobytes(), 100, 2)) == 2
    with pytest.raises(FrameError, match=r"probability"):
        SparseDistribution.decode(head + np.array([0.5, bad], "<f2").tobytes(), 100, 2)


def test_all_probabilities_0_are_refused() -> None:
    with pytest.raises(FrameError, match="every probability is 0"):
        SparseDistribution.decode(bytes(2 * 5), 5, 5)


@pytest.mark.parametrize("count", [-1, 0, 101, 2**62])
def test_an_impossible_number_of_entries_is_refused(count: int) -> None:
    with pytest.raises(FrameError, match=f"{count} entries; allowed: 1 to 100"):
        SparseDistribution.decode(bytes(10), 100, count)


@pytest.mark.parametrize("change", [-2, -1, 1, 2])
@pytest.mark.parametrize(("vocab_size", "count"), [(100, 3), (4, 4)])
def test_a_wrong_length_is_refused(vocab_size: int, count: int, change: int) -> None:
    honest = SparseDistribution.round_off(vocab_size, np.arange(count), np.full(count, 1 / count)).encode()
    with pytest.raises(FrameError, match=f"allowed: {len(honest)}"):
        SparseDistribution.decode((honest + bytes(2))[: len(honest) + change], vocab_size, count)


def elias_fano(vocab_size: int, support: Sequence[int]) -> bytes:
    """Elias-Fano by its definition, bit by bit, whatever the ids; then halves."""
    low_bits = (vocab_size // len(support)).bit_length() - 1
    low = "".join(f"{token_id % 2**low_bits:0{low_bits}b}"[::-1] for token_id in support)
    unary = ["0"] * (len(support) + (vocab_size - 1 >> low_bits))
    for index, token_id in enumerate(support):
        unary[(token_id >> low_bits) + index] = "1"
    sections = (low, "".join(unary))
    padded = (section + "0" * (-len(section) % 8) for section in sections)
    head = b"".join(int(section, 2).to_bytes(len(section) // 8) for section in padded)
    return head + np.full(len(support), 1 / len(support), "<f2").tobytes()


@pytest.mark.parametrize("support", [[5, 5], [9, 5], [5, 100], [99, 103]])
def test_ids_that_do_not_ascend_or_are_not_in_the_vocabulary_are_refused(support: list[int]) -> None:
    assert SparseDistribution.decode(elias_fano(100, [5, 99]), 100, 2).support.tolist() == [5, 99]
    with pytest.raises(FrameError, match="not ascending ids below 100"):
        SparseDistribution.decode(elias_fano(100, support), 100, 2)


@given(st.sets(st.integers(0, 4999), min_size=1, max_size=40))
@relaxed
def test_the_layout_is_elias_fano_as_its_definition_says(ids: set[int]) -> None:
    support = sorted(ids)
    written = SparseDistribution.round_off(5000, np.array(support), np.full(len(support), 1 / len(support)))
    assert written.encode() == elias_fano(5000, support)


@pytest.mark.parametrize("ones", [0, 1, 3])
def test_a_support_of_another_size_than_said_is_refused(ones: int) -> None:
    low_bits, unary_bytes = 5, 1  # of 2 among 100: 10 low bits in 2 bytes, 2 + (99 >> 5) = 5 high bits in 1
    unary = int("1" * ones + "0" * (8 * unary_bytes - ones), 2)
    frame = bytes(-(-2 * low_bits // 8)) + bytes([unary]) + np.array([0.5, 0.5], "<f2").tobytes()
    with pytest.raises(FrameError, match=f"{ones} ids; the message says 2"):
        SparseDistribution.decode(frame, 100, 2)


def test_samples_are_as_frequent_as_probable() -> None:
    probs = np.random.default_rng(3).dirichlet(np.full(12, 0.5))
    distribution = SparseDistribution.round_off(50, np.arange(4, 40, 3), probs)
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
    distribution = of_weights(4, [0, 1, 2, 3], [0, 1, 0, 0])
    assert {distribution.sample(bits) for bits in (0, 1, 2**UNIFORM_BITS - 1)} == {1}


@dataclass
class WideModel:
    """20 000 tokens, every other time half of them a little likelier than the rest: in FP16 all are alike."""

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


def test_invariant_1_the_device_samples_from_what_the_bytes_say() -> None:
    prompt, draft_len, codec, differs = [1, 2], 8, FrameCodec(20_000), 0
    for seed in range(3):
        model = cast(DraftModel, WideModel())
        guess = Drafter(model, Mode.FULL, Sampling(1.0, seed=seed), 4).draft(prompt, draft_len)
        arrived = codec.decode(codec.encode(Draft(0, 1, guess.token_ids, guess.distributions)))
        assert isinstance(arrived, Draft)
        assert arrived.token_ids == guess.token_ids
        assert arrived.distributions == guess.distributions
        for index, (token_id, distribution) in enumerate(zip(guess.token_ids, guess.distributions, strict=True)):
            bits = random_bits(seed, len(prompt) + index, Stream.DRAFT)
            assert token_id == sent(distribution).sample(bits)
            differs += token_id != unrounded_sample(len(prompt) + index, bits)
    assert differs > 0, "the case has no teeth: rounding never changed a token"
