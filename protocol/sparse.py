"""A draft distribution as both ends see it: what the bytes say, and nothing finer.

The device builds one from its probabilities and samples from it; what it sends
(``drafted.py``) decodes to the same, and the base station verifies against that
(invariant 1). Every probability is a ratio of integers, so no rounding differs
between processors.

There are two kinds. Where few tokens are kept, probabilities are whole numbers
of steps of 1/N; a token that comes to none leaves the support. Where all V are
kept, for the baseline, they are FP16 numbers: multiples of 2⁻²⁴.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from protocol.errors import FrameError
from protocol.randomness import UNIFORM_BITS

MAX_STEPS = 2**24
_UNIT = 2**24  # every FP16 number is a multiple of 1/_UNIT


@dataclass(frozen=True, eq=False, slots=True)
class SparseDistribution:
    """A distribution over ``vocab_size`` tokens with K of them possible.

    ``support`` is int64[K], ascending ids; ``weights`` is int64[K], each at
    least 1 (at least 0 in a whole distribution); a token's probability is its
    weight divided by ``total``, the sum of them. ``whole`` says that all V
    tokens are kept and the weights are FP16 numbers in units of 2⁻²⁴.
    """

    vocab_size: int
    support: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int64]
    total: int
    whole: bool = False

    @classmethod
    def quantize(
        cls, vocab_size: int, support: npt.NDArray[np.int64], probs: npt.NDArray[np.float64], steps: int
    ) -> Self:
        """Round ``probs`` (float64[K], for the ids of ``support`` in any order) to steps of 1/``steps``.

        Rounded down, then up again where most was lost, until they sum to 1:
        of all such distributions the nearest in total variation.
        """
        order = np.argsort(support)
        support, exact = support[order], probs[order] * (steps / probs.sum())
        weights = exact.astype(np.int64)
        missing = steps - int(weights.sum())
        weights[np.argsort(weights - exact, kind="stable")[:missing]] += 1
        possible = weights > 0
        return cls(vocab_size, support[possible], weights[possible], steps)

    @classmethod
    def quantize_fp16(cls, probs: npt.NDArray[np.float64]) -> Self:
        """Round the probabilities of all tokens (float64[V]) to FP16."""
        return cls._from_fp16(probs.astype("<f2"))

    @classmethod
    def _from_fp16(cls, fp16: npt.NDArray[np.float16]) -> Self:
        weights = (fp16.astype(np.float64) * _UNIT).astype(np.int64)
        return cls(len(fp16), np.arange(len(fp16)), weights, int(weights.sum()), whole=True)

    def encode_fp16(self) -> bytes:
        """The probabilities of a whole distribution in FP16, little-endian."""
        return (self.weights / _UNIT).astype("<f2").tobytes()

    @classmethod
    def decode_fp16(cls, data: bytes) -> Self:
        """Read the FP16 probabilities of all tokens.

        Raises:
            FrameError: a probability is no number in [0, 1], or all are 0.
        """
        fp16 = np.frombuffer(data, "<f2")
        if not ((fp16 >= 0) & (fp16 <= 1)).all():  # NaN compares false
            raise FrameError("a probability of a distribution is no number in [0, 1]")
        decoded = cls._from_fp16(fp16)
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
            and (self.vocab_size, self.whole) == (other.vocab_size, other.whole)
            and np.array_equal(self.support, other.support)
            and np.array_equal(self.weights, other.weights)
        )

    __hash__ = None  # type: ignore[assignment]
