"""A quantized draft distribution, the same on both ends.

The device quantizes its probabilities and samples from the result. The bytes that
it sends (``draft_codec.py``) decode to the same distribution, which the base station
verifies against (invariant 1). Every probability is a ratio of integers, so rounding
is the same on every processor.

There are two kinds. A sparse distribution has probabilities that are multiples of
1/N; tokens that round to 0 leave the support. A full one keeps all V tokens, with
FP16 probabilities, which are multiples of 2⁻²⁴; it serves the baseline.
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
    """A distribution over ``vocab_size`` tokens with K entries.

    ``support`` is int64[K], ascending ids. ``weights`` is int64[K], each at least 1 (at
    least 0 in a full distribution). A token's probability is its weight divided by
    ``total``, the sum of the weights. If ``is_full``, all V tokens are kept and the
    weights are FP16 numbers in units of 2⁻²⁴.
    """

    vocab_size: int
    support: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int64]
    total: int
    is_full: bool = False

    @classmethod
    def quantize(
        cls, vocab_size: int, support: npt.NDArray[np.int64], probs: npt.NDArray[np.float64], steps: int
    ) -> Self:
        """Round ``probs`` (float64[K], of the ids in ``support`` in any order) to multiples of 1/``steps``.

        Largest-remainder rounding: round all down, then add a step to those with the
        largest remainders until they sum to 1. The result is the nearest such
        distribution in total variation.
        """
        order = np.argsort(support)
        support, exact = support[order], probs[order] * (steps / probs.sum())
        weights = exact.astype(np.int64)
        missing = steps - int(weights.sum())
        weights[np.argsort(weights - exact, kind="stable")[:missing]] += 1
        kept = weights > 0
        return cls(vocab_size, support[kept], weights[kept], steps)

    @classmethod
    def quantize_fp16(cls, probs: npt.NDArray[np.float64]) -> Self:
        """Round the probabilities of all tokens (float64[V]) to FP16."""
        return cls._from_fp16(probs.astype("<f2"))

    @classmethod
    def _from_fp16(cls, fp16: npt.NDArray[np.float16]) -> Self:
        weights = (fp16.astype(np.float64) * _UNIT).astype(np.int64)
        return cls(len(fp16), np.arange(len(fp16)), weights, int(weights.sum()), is_full=True)

    def encode_fp16(self) -> bytes:
        """Encode the probabilities of a full distribution in FP16, little-endian."""
        return (self.weights / _UNIT).astype("<f2").tobytes()

    @classmethod
    def decode_fp16(cls, data: bytes) -> Self:
        """Decode the FP16 probabilities of all tokens.

        Raises:
            FrameError: a probability is not in [0, 1], or all are 0.
        """
        fp16 = np.frombuffer(data, "<f2")
        if not ((fp16 >= 0) & (fp16 <= 1)).all():  # NaN compares false
            raise FrameError("a probability of a distribution is not in [0, 1]")
        decoded = cls._from_fp16(fp16)
        if decoded.total == 0:
            raise FrameError("all probabilities of a distribution are 0")
        return decoded

    def sample(self, random_bits: int) -> int:
        """Sample by inverse transform from a uniform integer of ``UNIFORM_BITS`` bits."""
        threshold = random_bits * self.total >> UNIFORM_BITS
        return int(self.support[np.searchsorted(np.cumsum(self.weights), threshold, side="right")])

    def probability(self, token_id: int) -> float:
        """The probability of a token; 0 outside the support."""
        index = int(np.searchsorted(self.support, token_id))
        if index == len(self) or self.support[index] != token_id:
            return 0.0
        return int(self.weights[index]) / self.total

    @property
    def probs(self) -> npt.NDArray[np.float64]:
        """The probabilities of the support, float64[K]."""
        return self.weights / self.total

    def __len__(self) -> int:
        return len(self.support)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SparseDistribution)
            and (self.vocab_size, self.is_full) == (other.vocab_size, other.is_full)
            and np.array_equal(self.support, other.support)
            and np.array_equal(self.weights, other.weights)
        )

    __hash__ = None  # type: ignore[assignment]
