"""A sparse draft distribution, the same on both ends.

The device quantizes its probabilities and samples from the result. The bytes that
it sends (``draft_codec.py``) decode to the same distribution, which the base station
verifies against (invariant 1). Every probability is a ratio of integers, so rounding
is the same on every processor.

Probabilities are multiples of 1/N; tokens that round to 0 leave the support.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from protocol.randomness import UNIFORM_BITS

MAX_STEPS = 2**24


@dataclass(frozen=True, eq=False, slots=True)
class SparseDistribution:
    """A distribution over ``vocab_size`` tokens with K entries.

    ``support`` is int64[K], ascending ids. ``weights`` is int64[K], each at least 1. A
    token's probability is its weight divided by ``total``, the sum of the weights.
    """

    vocab_size: int
    support: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int64]
    total: int

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

    def sample(self, random_bits: int) -> int:
        """Sample by inverse transform from a uniform integer of ``UNIFORM_BITS`` bits."""
        threshold = random_bits * self.total >> UNIFORM_BITS
        return int(self.support[np.searchsorted(np.cumsum(self.weights), threshold, side="right")])

    @property
    def probs(self) -> npt.NDArray[np.float64]:
        """The probabilities of the support, float64[K]."""
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
