"""Gumbel coupling: both ends add the same Gumbel noise to their scores and take the argmax.

``argmax_v(score_v + G_v)`` with independent standard Gumbel G_v is a sample of
softmax(score). G is a function of (seed, position, token), so the base station's
token depends on its target alone, whatever was drafted. A device that adds the
same noise to the draft model's scores mostly chooses the same token
(Daliri et al., arXiv:2408.07978), so a Draft carries ids only.

V logarithms at every position would cost more than drafting. The noise is
therefore generated top-down (Maddison et al., arXiv:1411.0030): for each block of
``BLOCK`` tokens first the largest noise, which is Gumbel(ln BLOCK), and its index
in the block; then the noise of the other tokens, standard Gumbel numbers
truncated at that maximum, only for blocks that can still contain the argmax.

Integers come from a 32-bit hash built from operations that NumPy and torch share,
so they are the same on every processor.
"""

from functools import cache
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

from protocol.randomness import WORD_BITS, Stream, random_word, random_words

BLOCK = 256
_MASK = 2**32 - 1
MAX_MARGIN = 2.0
SLACK = 1e-3  # exceeds the rounding error when sums are compared with their parts
Integers64: TypeAlias = npt.NDArray[np.int64]
Integers = TypeVar("Integers")
"""int64 arrays of NumPy or tensors of torch."""


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """The two 32-bit words that seed the noise of one position."""
    word = random_word(seed, position, Stream.NOISE)
    return word & _MASK, word >> WORD_BITS // 2


def noise_keys(seeds: npt.ArrayLike, positions: npt.ArrayLike) -> Integers64:
    """``noise_key`` of many positions at once: int64 [2, n]."""
    words = random_words(seeds, positions, Stream.NOISE)
    return np.stack([words & np.uint64(_MASK), words >> np.uint64(WORD_BITS // 2)]).astype(np.int64)


def hash32(index: Integers, low: Integers | int, high: Integers | int) -> Integers:
    """32 random bits for each index under a key; int64 in and out, elementwise.

    Two rounds of a 32-bit finaliser (xor-shift and multiply, constants of
    Wellons' search for low bias), with half of the key before each.
    """
    mixed: Integers = _mix32(_mix32(cast(Any, index) ^ low) ^ high)
    return mixed


def _mix32(word: Any) -> Any:
    word = (word ^ word >> 16) * 0x7FEB352D & _MASK
    word = (word ^ word >> 15) * 0x846CA68B & _MASK
    return word ^ word >> 16


def argmax_and_margin(sums: npt.NDArray[np.floating]) -> tuple[int, float]:
    """The index of the largest number, and its margin over the second largest, at most ``MAX_MARGIN``."""
    index = int(sums.argmax())
    rest = max(sums[:index].max(initial=-np.inf), sums[index + 1 :].max(initial=-np.inf))
    return index, min(float(sums[index] - rest), MAX_MARGIN)


@cache
def _blocks(vocab_size: int) -> tuple[Integers64, Integers64, npt.NDArray[np.float64], Integers64]:
    """What all positions share: block starts, block sizes, their logarithms, and two hash indices per block."""
    starts = np.arange(0, vocab_size, BLOCK)
    sizes = np.minimum(vocab_size - starts, BLOCK)
    return starts, sizes, np.log(sizes), np.arange(2 * len(sizes))


class PositionNoise:
    """The noise of all tokens at one position, generated lazily.

    Hash indices under the position's key, with n blocks: b < n for the largest noise
    of block b, n + b for its index in the block, 2n + v for token v.
    """

    def __init__(self, seed: int, position: int, vocab_size: int) -> None:
        self._key = noise_key(seed, position)
        self._starts, sizes, log_sizes, indices = _blocks(vocab_size)
        hashes = hash32(indices, *self._key)
        count = len(sizes)
        self._maxima = log_sizes - np.log(-np.log((hashes[:count] + 0.5) * 2.0**-32))
        self._peaks = self._starts + (hashes[count:] * sizes >> 32)

    def of(self, token_ids: Integers64) -> npt.NDArray[np.float64]:
        """The noise of ``token_ids``, float64 of the same shape."""
        blocks = token_ids // BLOCK
        maxima = self._maxima[blocks]
        hashes = hash32(token_ids + 2 * len(self._maxima), *self._key)
        below: npt.NDArray[np.float64] = -np.log(np.exp(-maxima) - np.log((hashes + 0.5) * 2.0**-32))
        return np.where(token_ids == self._peaks[blocks], maxima, below)

    def choose(self, logits: npt.NDArray[np.floating], temperature: float = 1.0) -> tuple[int, float]:
        """The token with the largest score plus noise, and its margin, at most ``MAX_MARGIN``.

        The best sum of the most promising block is a lower bound. Only tokens that
        can exceed it with their block's largest noise are evaluated.

        Args:
            logits: [V], -inf for tokens that must not be chosen.
            temperature: scores are logits / temperature.
        """
        bounds = np.maximum.reduceat(logits, self._starts) / temperature + self._maxima
        start = int(bounds.argmax()) * BLOCK
        likely = np.arange(start, min(start + BLOCK, len(logits)))
        best = (logits[likely] / temperature + self.of(likely)).max()
        needed = ((best - self._maxima - MAX_MARGIN - SLACK) * temperature).astype(np.float32)
        candidates = np.flatnonzero(self._blocks_of(logits) >= needed[:, None])
        index, margin = argmax_and_margin(logits[candidates] / temperature + self.of(candidates))
        return int(candidates[index]), margin

    @staticmethod
    def _blocks_of(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """The logits as one row per block, padded with -inf."""
        missing = -len(logits) % BLOCK
        return (np.pad(logits, (0, missing), constant_values=-np.inf) if missing else logits).reshape(-1, BLOCK)
