"""Bit packing: round trips, the length that the definition gives, and refusal of invalid bits."""

from collections.abc import Sequence
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.bits import BitReader, number_bits, pack, set_bits
from protocol.errors import FrameError


@given(st.integers(0, 32).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1), max_size=20))))
def test_numbers_of_any_width_round_trip(case: tuple[int, list[int]]) -> None:
    width, numbers = case
    reader = BitReader(pack([number_bits(numbers, width), number_bits([5], 3)]))
    assert reader.numbers(len(numbers), width).tolist() == numbers
    assert reader.numbers(1, 3).tolist() == [5]
    reader.finish()


def elias_fano(universe: int, members: Sequence[int]) -> bytes:
    """Elias–Fano by its definition, bit by bit, without validation."""
    low_bits = (universe // len(members)).bit_length() - 1
    unary = ["0"] * (len(members) + (universe - 1 >> low_bits))
    for index, member in enumerate(members):
        unary[(member >> low_bits) + index] = "1"
    low = "".join(f"{member % 2**low_bits:0{low_bits}b}"[::-1] if low_bits else "" for member in members)
    bits = "".join(unary) + low
    return int(bits + "0" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8))


@given(st.integers(0, 4999).flatmap(lambda top: st.tuples(st.just(top + 1), st.sets(st.integers(0, top), min_size=1))))
@settings(deadline=None)
def test_a_set_is_encoded_in_elias_fano_form(case: tuple[int, set[int]]) -> None:
    universe, members = case[0], sorted(case[1])
    packed = pack([set_bits(np.array(members), universe)])
    assert packed == elias_fano(universe, members)
    reader = BitReader(packed)
    assert reader.members(len(members), universe).tolist() == members
    reader.finish()


@pytest.mark.parametrize(
    ("universe", "count"),
    [(2, 1), (1000, 1), (32_000, 64), (49_152, 8), (49_152, 32), (49_152, 128), (128_256, 32), (151_936, 1)],
)
def test_a_set_is_within_5_percent_of_the_information_bound(universe: int, count: int) -> None:
    members = np.sort(np.random.default_rng(count).choice(universe, count, replace=False))
    bound = (comb(universe, count) - 1).bit_length()
    assert bound <= len(set_bits(members, universe)) <= 1.05 * bound + 8


def test_the_empty_set_has_no_bits() -> None:
    assert len(set_bits(np.zeros(0, np.int64), 100)) == 0
    assert BitReader(b"").members(0, 100).tolist() == []


@pytest.mark.parametrize("members", [[5, 5], [9, 5], [5, 100], [99, 103]])
def test_members_that_are_not_ascending_or_too_large_are_refused(members: list[int]) -> None:
    assert BitReader(elias_fano(100, [5, 99])).members(2, 100).tolist() == [5, 99]
    with pytest.raises(FrameError, match="not ascending numbers below 100"):
        BitReader(elias_fano(100, members)).members(2, 100)


@pytest.mark.parametrize("ones", [0, 1, 3])
def test_a_set_of_unexpected_size_is_refused(ones: int) -> None:
    unary = int("1" * ones + "0" * (8 - ones), 2)  # 2 members below 100: 2 + (99 >> 5) = 5 high bits, then 10 low bits
    with pytest.raises(FrameError, match=f"{ones} members; expected 2"):
        BitReader(bytes([unary, 0])).members(2, 100)


def test_too_large_sizes_are_refused_before_allocation() -> None:
    with pytest.raises(FrameError, match="a field has 16 bits; expected"):
        BitReader(b"ab").members(2**40, 2**60)
    with pytest.raises(FrameError, match="a field has 16 bits; expected"):
        BitReader(b"ab").numbers(2**40, 32)
    with pytest.raises(FrameError, match="a field has 16 bits; expected 17 or more"):
        BitReader(b"ab").numbers(17, 1)


@pytest.mark.parametrize("rest", [b"\x01", b"\x80", b"\x00\x00"])
def test_padding_other_than_zeros_is_refused(rest: bytes) -> None:
    reader = BitReader(b"\x00" + rest)
    reader.numbers(1, 8)
    with pytest.raises(FrameError, match="more bits than expected"):
        reader.finish()
