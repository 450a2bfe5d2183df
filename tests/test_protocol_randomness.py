"""Random numbers are a function of (seed, position, stream), uniform and uncorrelated."""

import math
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import chisquare, kstest

from protocol.randomness import UNIFORM_BITS, Stream, random_bits, random_word, random_words, uniforms
from tests.p_values import FALSE_ALARM

COUNT = 50_000
KNOWN = [
    (0, 0, Stream.DRAFT, 1660627371350223),
    (1, 2, Stream.ACCEPT, 8204650028589493),
    (2**63 - 1, 131_072, Stream.RESULT, 2741292405388044),
    (42, 7, Stream.DRAFT, 1978734664277493),
]


def numbers(seed: int, stream: Stream, count: int = COUNT, first: int = 0) -> npt.NDArray[np.float64]:
    return uniforms([seed] * count, range(first, first + count), stream)


def correlation(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """In standard deviations of the correlation of independent numbers."""
    return abs(float(np.corrcoef(one, other)[0, 1])) * math.sqrt(len(one))


@pytest.mark.parametrize(("seed", "position", "stream", "bits"), KNOWN)
def test_known_numbers_are_reproduced(seed: int, position: int, stream: Stream, bits: int) -> None:
    assert random_bits(seed, position, stream) == bits


@pytest.mark.parametrize("stream", Stream)
def test_vectorized_numbers_equal_scalar_ones(stream: Stream) -> None:
    seeds, positions = (list(values) for values in zip(*product((0, 1, 42, 2**63 - 1), (0, 7, 131_072)), strict=True))
    pairs = list(zip(seeds, positions, strict=True))
    assert random_words(seeds, positions, stream).tolist() == [random_word(*pair, stream) for pair in pairs]
    assert uniforms(seeds, positions, stream).tolist() == [
        random_bits(*pair, stream) / 2**UNIFORM_BITS for pair in pairs
    ]


@pytest.mark.parametrize("stream", [Stream.DRAFT, Stream.ACCEPT])
def test_numbers_of_block_verification_depend_on_the_first_drafted_position_too(stream: Stream) -> None:
    asked = [(seed, position, first) for seed in (0, 1) for position in range(20) for first in range(position + 1)]
    found = [random_word(seed, position, stream, first) for seed, position, first in asked]
    assert len({*found, *(random_word(seed, position, stream) for seed, position, _ in asked)}) == len(found) + 40
    seeds, positions, first_positions = (list(values) for values in zip(*asked, strict=True))
    assert random_words(seeds, positions, stream, first_positions).tolist() == found
    uniform = uniforms([7] * COUNT, [COUNT] * COUNT, stream, range(COUNT))
    assert kstest(uniform, "uniform").pvalue > FALSE_ALARM


def test_invariant_2_a_number_depends_only_on_seed_position_and_stream() -> None:
    asked = list(product((0, 1, 2**63 - 1), range(40), Stream))
    first = {key: random_bits(*key) for key in asked}
    again = {key: random_bits(*key) for key in reversed(asked) for _ in range(2)}
    assert first == again
    assert len(set(first.values())) == len(asked)  # depends on each of them


def test_a_uniform_number_is_its_bits_as_a_fraction() -> None:
    for seed, position, stream, bits in KNOWN:
        assert 0 <= bits < 2**UNIFORM_BITS
        assert uniforms([seed], [position], stream).tolist() == [bits / 2**UNIFORM_BITS]


@pytest.mark.parametrize("stream", Stream)
@pytest.mark.parametrize("seed", [0, 2**40 + 1])
def test_numbers_are_uniform(seed: int, stream: Stream) -> None:
    sample = numbers(seed, stream)
    assert kstest(sample, "uniform").pvalue > FALSE_ALARM
    assert chisquare(np.histogram(sample, bins=256, range=(0, 1))[0]).pvalue > FALSE_ALARM


def test_every_bit_is_set_half_the_time() -> None:
    words = np.array([random_bits(seed, 5, Stream.ACCEPT) for seed in range(20_000)])
    ones = (words[:, None] >> np.arange(UNIFORM_BITS) & 1).sum(axis=0)
    assert (np.abs(ones - 10_000) < 5 * 20_000**0.5 / 2).all()


def test_streams_are_uncorrelated() -> None:
    for one, other in combinations(Stream, 2):
        assert correlation(numbers(7, one), numbers(7, other)) < 4


def test_adjacent_positions_are_uncorrelated() -> None:
    sample = numbers(7, Stream.DRAFT)
    for lag in (1, 2, 8):
        assert correlation(sample[:-lag], sample[lag:]) < 4


def test_adjacent_seeds_are_uncorrelated() -> None:
    for other in (8, 7 + 2**32, 6):
        assert correlation(numbers(7, Stream.RESULT), numbers(other, Stream.RESULT)) < 4


def test_seed_and_position_are_not_interchangeable() -> None:
    """Seed 1 is not seed 0 shifted by one position."""
    assert correlation(numbers(0, Stream.DRAFT, first=1), numbers(1, Stream.DRAFT)) < 4
    assert random_bits(3, 5, Stream.DRAFT) != random_bits(5, 3, Stream.DRAFT)
