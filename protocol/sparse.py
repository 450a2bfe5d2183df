"""A draft distribution as both ends see it: what the bytes say, and nothing finer.

The device builds one from its probabilities, encodes it, and samples from what
the bytes decode to; the base station decodes the same bytes with the same
function and verifies against that (invariant 1). Every probability is a ratio
of integers, so no rounding differs between processors.

Layout of the bytes, for K of V tokens kept:

1. the support, a set of K ids in Elias–Fano form: K low parts of
   ``r = ⌊log2(V/K)⌋`` bits each, then the high parts in unary, K ones among at
   most K + ⌊(V−1)/2ʳ⌋ bits; each section padded to a byte. Absent where K = V.
   Within 5 % of the bound ⌈log2 C(V, K)⌉ for K = 32 of V = 49152 (50 B).
2. K probabilities in FP16, little-endian, in the order of the ids.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from protocol.errors import FrameError
from protocol.randomness import UNIFORM_BITS

_UNIT = 2**24  # every FP16 number is a multiple of 1/_UNIT


@dataclass(frozen=True, eq=False, slots=True)
class SparseDistribution:
    """A distribution over ``vocab_size`` tokens with K of them possible.

    ``support`` is int64[K], ascending ids; ``weights`` is int64[K], each at
    least 1 (at least 0 where K = V); a token's probability is its weight
    divided by ``total``.
    """

    vocab_size: int
    support: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int64]
    total: int

    @classmethod
    def round_off(cls, vocab_size: int, support: npt.NDArray[np.int64], probs: npt.NDArray[np.float64]) -> Self:
        """Round ``probs`` (float64[K], for the ids of ``support`` in any order) to what can be sent.

        Tokens whose probability rounds to 0 leave the support, unless all V are kept.
        """
        order = np.argsort(support)
        support, halves = support[order], probs[order].astype("<f2")
        if len(support) < vocab_size:
            possible = halves > 0
            support, halves = support[possible], halves[possible]
        return cls._from_halves(vocab_size, support, halves)

    @classmethod
    def _from_halves(cls, vocab_size: int, support: npt.NDArray[np.int64], halves: npt.NDArray[np.float16]) -> Self:
        weights = (halves.astype(np.float64) * _UNIT).astype(np.int64)
        return cls(vocab_size, support, weights, int(weights.sum()))

    def encode(self) -> bytes:
        """The bytes of the layout above."""
        halves = (self.weights / _UNIT).astype("<f2").tobytes()
        return halves if len(self) == self.vocab_size else _encode_support(self.support, self.vocab_size) + halves

    @classmethod
    def decode(cls, data: bytes, vocab_size: int, count: int) -> Self:
        """Read ``count`` entries over ``vocab_size`` tokens from ``data``.

        Raises:
            FrameError: the length is wrong, ids are not ascending ids of the
                vocabulary, a probability is no finite number in (0, 1], or all are 0.
        """
        if not 1 <= count <= vocab_size:
            raise FrameError(f"a distribution of {count} entries; allowed: 1 to {vocab_size}")
        whole = count == vocab_size
        head = 0 if whole else _support_bytes(count, vocab_size)
        if len(data) != head + 2 * count:
            raise FrameError(f"a distribution of {count} entries in {len(data)} bytes; allowed: {head + 2 * count}")
        support = np.arange(vocab_size) if whole else _decode_support(data[:head], vocab_size, count)
        halves = np.frombuffer(data, "<f2", offset=head)
        allowed = (halves >= 0) if whole else (halves > 0)
        if not (allowed & (halves <= 1)).all():  # NaN compares false
            raise FrameError("a probability of a distribution is no number in (0, 1]")
        decoded = cls._from_halves(vocab_size, support, halves)
        if decoded.total == 0:
            raise FrameError("a distribution in which every probability is 0")
        return decoded

    def sample(self, random_bits: int) -> int:
        """The token that a uniform number of ``UNIFORM_BITS`` bits falls on (inverse of the cumulative sum)."""
        threshold = random_bits * self.total >> UNIFORM_BITS
        return int(self.support[np.searchsorted(np.cumsum(self.weights), threshold, side="right")])

    def probability(self, token_id: int) -> float:
        """The probability of one token; 0 outside the support."""
        index = int(np.searchsorted(self.support, token_id))
        if index == len(self) or self.support[index] != token_id:
            return 0.0
        return int(self.weights[index]) / self.total

    @property
    def probs(self) -> npt.NDArray[np.float64]:
        """float64[K], the probabilities of the support."""
        return self.weights / self.total

    def __len__(self) -> int:
        return len(self.support)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SparseDistribution)
            and self.vocab_size == other.vocab_size
            and np.array_equal(self.support, other.support)
            and np.array_equal(self.weights, other.weights)
        )

    __hash__ = None  # type: ignore[assignment]


def _low_bits(count: int, vocab_size: int) -> int:
    return (vocab_size // count).bit_length() - 1


def _unary_bits(count: int, vocab_size: int) -> int:
    return count + (vocab_size - 1 >> _low_bits(count, vocab_size))


def _support_bytes(count: int, vocab_size: int) -> int:
    return -(-count * _low_bits(count, vocab_size) // 8) + -(-_unary_bits(count, vocab_size) // 8)


def _encode_support(support: npt.NDArray[np.int64], vocab_size: int) -> bytes:
    count = len(support)
    low_bits = _low_bits(count, vocab_size)
    low = support[:, None] >> np.arange(low_bits) & 1
    unary = np.zeros(_unary_bits(count, vocab_size), np.uint8)
    unary[(support >> low_bits) + np.arange(count)] = 1
    return np.packbits(low.astype(np.uint8)).tobytes() + np.packbits(unary).tobytes()


def _decode_support(data: bytes, vocab_size: int, count: int) -> npt.NDArray[np.int64]:
    low_bits = _low_bits(count, vocab_size)
    packed = np.frombuffer(data, np.uint8)
    low_bytes = -(-count * low_bits // 8)
    low = np.unpackbits(packed[:low_bytes], count=count * low_bits).reshape(count, low_bits)
    high = np.flatnonzero(np.unpackbits(packed[low_bytes:], count=_unary_bits(count, vocab_size)))
    if len(high) != count:
        raise FrameError(f"a support of {len(high)} ids; the message says {count}")
    ids: npt.NDArray[np.int64] = (high - np.arange(count) << low_bits) + low @ (1 << np.arange(low_bits))
    if (np.diff(ids) <= 0).any() or ids[-1] >= vocab_size:
        raise FrameError(f"the ids of a support are not ascending ids below {vocab_size}")
    return ids
