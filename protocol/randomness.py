"""Random numbers as a function of (seed, position), the same on both ends.

There is no generator state, so a resent round, a resumed session or another batch
gets the same numbers. ``position`` counts the tokens of the sequence, the prompt
included. No position is verified twice with different numbers, and the numbers of
positions after a rejected token were not used.

In block verification they were: there the numbers of the streams ``DRAFT`` and ``ACCEPT``
depend on the position of the first token of the Draft too (``first_drafted``), so that a
position that is drafted again gets numbers that are independent of the rejection.
"""

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

WORD_BITS = 64
_WORD = 2**WORD_BITS - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴ / golden ratio: the step of the SplitMix64 generator
UNIFORM_BITS = 53  # a float64 in [0, 1) holds them exactly


class Stream(IntEnum):
    """The purpose of a random number; numbers of different streams are independent."""

    DRAFT = 1
    """The device draws a draft token."""
    ACCEPT = 2
    """The base station accepts or rejects it."""
    RESULT = 3
    """The base station draws the recovered or bonus token."""
    NOISE = 4
    """Both ends generate the shared noise of mode ``coupled``."""


def random_bits(seed: int, position: int, stream: Stream, first_drafted: int | None = None) -> int:
    """53 uniform random bits, as an integer in [0, 2⁵³)."""
    return random_word(seed, position, stream, first_drafted) >> (WORD_BITS - UNIFORM_BITS)


def random_word(seed: int, position: int, stream: Stream, first_drafted: int | None = None) -> int:
    """64 uniform random bits, as an integer in [0, 2⁶⁴).

    SplitMix64's output function (Steele, Lea, Flood 2014), chained over the
    words, so that every bit of each reaches every bit of the result.
    """
    word = 0
    for part in (seed, position, stream) if first_drafted is None else (seed, position, stream, first_drafted):
        word = _mix((word ^ (part & _WORD)) + _GOLDEN & _WORD)
    return word


def random_words(
    seeds: npt.ArrayLike, positions: npt.ArrayLike, stream: Stream, first_drafted: npt.ArrayLike | None = None
) -> npt.NDArray[np.uint64]:
    """``random_word`` of many seeds and positions, one stream: uint64 [n]."""
    words = np.zeros(np.shape(seeds), np.uint64)
    for part in (seeds, positions, stream) if first_drafted is None else (seeds, positions, stream, first_drafted):
        words = _mix((words ^ np.asarray(part, np.uint64)) + np.uint64(_GOLDEN))
    return words


def uniforms(
    seeds: npt.ArrayLike, positions: npt.ArrayLike, stream: Stream, first_drafted: npt.ArrayLike | None = None
) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), multiples of 2⁻⁵³, of many seeds and positions, one stream: float64 [n]."""
    bits = random_words(seeds, positions, stream, first_drafted) >> np.uint64(WORD_BITS - UNIFORM_BITS)
    return bits.astype(np.float64) * 2.0**-UNIFORM_BITS


def _mix(word: Any) -> Any:
    """Mix an int, or a uint64 array, whose products wrap modulo 2⁶⁴."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31
