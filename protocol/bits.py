"""Bit packing: integers of fixed width, and sets of integers in Elias–Fano form.

Bits are uint8 arrays of 0 and 1, the lowest bit of a number first. A set of
``count`` numbers below ``universe`` is split at ``r = ⌊log2(universe / count)⌋``
bits: first the high parts in unary, ``count`` ones among
``count + ⌊(universe − 1) / 2ʳ⌋`` bits, then the low parts. Its length depends on
these two numbers only; for 32 of 49152 it is within 5 % of the bound
⌈log2 C(universe, count)⌉.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from protocol.errors import FrameError

Bits: TypeAlias = npt.NDArray[np.uint8]
Numbers: TypeAlias = npt.NDArray[np.int64]
_WORD = 32


def number_bits(numbers: Numbers | Sequence[int], width: int) -> Bits:
    """The bits of ``numbers``, each below 2**width, in ``width`` bits; ``width`` is at most 32."""
    words = np.asarray(numbers, "<u4").reshape(-1, 1).view(np.uint8)
    return np.unpackbits(words, axis=1, bitorder="little")[:, :width].ravel()


def set_bits(members: Numbers, universe: int) -> Bits:
    """The bits of the set of ``members``, strictly ascending numbers below ``universe``."""
    if not len(members):
        return np.zeros(0, np.uint8)
    low_width = _low_width(len(members), universe)
    unary = np.zeros(len(members) + (universe - 1 >> low_width), np.uint8)
    unary[(members >> low_width) + np.arange(len(members))] = 1
    return np.concatenate([unary, number_bits(members & (1 << low_width) - 1, low_width)])


def pack(sections: Sequence[Bits]) -> bytes:
    """Concatenate the bits of ``sections`` and pad them with zeros to a full byte."""
    return np.packbits(np.concatenate(sections)).tobytes()


class BitReader:
    """Reads packed bits in the order in which they were written.

    Every method raises FrameError on invalid bits, before it allocates anything
    that is not in proportion to the bits that are present.
    """

    def __init__(self, data: bytes) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self._start = 0

    def numbers(self, count: int, width: int) -> Numbers:
        """Read ``count`` numbers of ``width`` bits, int64."""
        bits = self._take(count * width)
        words = np.zeros((count, _WORD), np.uint8)
        words[:, :width] = bits.reshape(count, width)
        return np.packbits(words, axis=1, bitorder="little").view("<u4").ravel().astype(np.int64)

    def members(self, count: int, universe: int) -> Numbers:
        """Read a set of ``count`` strictly ascending numbers below ``universe``, int64."""
        if count == 0:
            return np.zeros(0, np.int64)
        low_width = _low_width(count, universe)
        high = np.flatnonzero(self._take(count + (universe - 1 >> low_width)))
        if len(high) != count:
            raise FrameError(f"a set has {len(high)} members; expected {count}")
        members: Numbers = (high - np.arange(count) << low_width) + self.numbers(count, low_width)
        if (members[1:] <= members[:-1]).any() or members[-1] >= universe:
            raise FrameError(f"the members of a set are not ascending numbers below {universe}")
        return members

    def finish(self) -> None:
        """Check that only the padding zeros of the last byte are left."""
        if self._left >= 8 or self._take(self._left).any():
            raise FrameError("a field has more bits than expected")

    @property
    def _left(self) -> int:
        return 8 * len(self._data) - self._start

    def _take(self, count: int) -> Bits:
        if count > self._left:
            raise FrameError(f"a field has {8 * len(self._data)} bits; expected {self._start + count} or more")
        first, end = self._start, self._start + count
        self._start = end
        return np.unpackbits(self._data[first >> 3 : end + 7 >> 3])[first & 7 : (first & 7) + count]


def _low_width(count: int, universe: int) -> int:
    return (universe // count).bit_length() - 1
