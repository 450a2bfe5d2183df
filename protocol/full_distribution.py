"""A full draft distribution, the baseline: FP16 probabilities of all V tokens, the same on both ends.

An FP16 number in [0, 1] is a multiple of 2⁻²⁴, so that every probability is a ratio of
integers, as in a sparse distribution.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from protocol.errors import FrameError
from protocol.randomness import UNIFORM_BITS

_UNIT = 2**24
_ONE = np.float16(1).view(np.uint16)  # up to it, a larger bit pattern is a larger number


@dataclass(frozen=True, eq=False, slots=True)
class FullDistribution:
    """A distribution over V tokens: ``fp16`` is float16[V]; a token's probability is its entry divided by their sum."""

    fp16: npt.NDArray[np.float16]

    @classmethod
    def quantize(cls, probs: npt.NDArray[np.float64]) -> Self:
        """Round the probabilities of all tokens (float64[V]) to FP16."""
        return cls(probs.astype("<f2"))

    @classmethod
    def decode(cls, data: bytes, vocab_size: int) -> tuple[Self, ...]:
        """Decode distributions of ``vocab_size`` tokens each, little-endian; they share the memory of ``data``.

        Raises:
            FrameError: a probability is not in [0, 1], or all of a distribution are 0.
        """
        fp16 = np.frombuffer(data, "<f2").reshape(-1, vocab_size)
        largest = fp16.view("<u2").max(axis=1)
        if (largest > _ONE).any():  # negative numbers, NaN and infinity have larger patterns than 1
            raise FrameError("a probability of a distribution is not in [0, 1]")
        if not largest.all():
            raise FrameError("all probabilities of a distribution are 0")
        return tuple(map(cls, fp16))

    def encode(self) -> bytes:
        """Encode the probabilities, little-endian."""
        return self.fp16.astype("<f2").tobytes()

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.fp16)

    @property
    def weights(self) -> npt.NDArray[np.int64]:
        """The probabilities of all tokens in units of 2⁻²⁴, int64[V]."""
        return (self.fp16.astype(np.float64) * _UNIT).astype(np.int64)

    @property
    def support(self) -> npt.NDArray[np.int64]:
        """The ids of all tokens, int64[V]."""
        return np.arange(len(self.fp16))

    @property
    def probs(self) -> npt.NDArray[np.float64]:
        """The probabilities of all tokens, float64[V]."""
        return self.weights / self.total

    @property
    def total(self) -> int:
        """The sum of the weights."""
        return int(self.fp16.sum(dtype=np.float64) * _UNIT)  # exact: a sum of multiples of 2⁻²⁴

    def sample(self, random_bits: int) -> int:
        """Sample by inverse transform from a uniform integer of ``UNIFORM_BITS`` bits."""
        cumulative = self.weights.cumsum()
        return int(cumulative.searchsorted(random_bits * int(cumulative[-1]) >> UNIFORM_BITS, side="right"))

    def probability(self, token_id: int) -> float:
        """The probability of a token."""
        return float(self.fp16[token_id]) * _UNIT / self.total

    def __len__(self) -> int:
        return len(self.fp16)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FullDistribution) and np.array_equal(self.fp16, other.fp16)

    __hash__ = None  # type: ignore[assignment]
