"""Random numbers that are a function of (seed, position), the same on both ends.

A lost and repeated round, a resumed session or another batch asks for the same
number and gets it: nothing here has a state. ``position`` counts the tokens of
the whole sequence, the prompt included, so no position is judged twice with
different numbers, and rejected drafts of later positions were never looked at.
"""

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

WORD_BITS = 64
_WORD = 2**WORD_BITS - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴ / golden ratio: the step of the SplitMix64 generator
UNIFORM_BITS = 53  # what a float64 in [0, 1) can hold exactly


class Stream(IntEnum):
    """What a random number is for; numbers of different streams are independent."""

    DRAFT = 1
    """The device draws a draft token."""
    ACCEPT = 2
    """The base station accepts or rejects it."""
    RESULT = 3
    """The base station draws the recovered or the bonus token."""
    NOISE = 4
    """Both ends make the noise that couples their choices."""


def random_bits(seed: int, position: int, stream: Stream) -> int:
    """53 uniform random bits, as an integer in [0, 2⁵³)."""
    return random_word(seed, position, stream) >> (WORD_BITS - UNIFORM_BITS)


def random_word(seed: int, position: int, stream: Stream) -> int:
    """64 uniform random bits, as an integer in [0, 2⁶⁴).

    SplitMix64's output function (Steele, Lea, Flood 2014), chained over the
    three words, so that every bit of each reaches every bit of the result.
    """
    word = 0
    for part in (seed, position, stream):
        word = _mix((word ^ (part & _WORD)) + _GOLDEN & _WORD)
    return word


def uniform(seed: int, position: int, stream: Stream) -> float:
    """A uniform random number in [0, 1), a multiple of 2⁻⁵³."""
    return random_bits(seed, position, stream) * 2.0**-UNIFORM_BITS


def random_words(seeds: npt.ArrayLike, positions: npt.ArrayLike, stream: Stream) -> npt.NDArray[np.uint64]:
    """``random_word`` of many at once, one stream: uint64 [n]."""
    words = np.zeros(np.shape(seeds), np.uint64)
    for part in (seeds, positions, stream):
        words = _mix((words ^ np.asarray(part, np.uint64)) + np.uint64(_GOLDEN))
    return words


def uniforms(seeds: npt.ArrayLike, positions: npt.ArrayLike, stream: Stream) -> npt.NDArray[np.float64]:
    """``uniform`` of many at once, one stream: float64 [n]."""
    bits = random_words(seeds, positions, stream) >> np.uint64(WORD_BITS - UNIFORM_BITS)
    return bits.astype(np.float64) * 2.0**-UNIFORM_BITS


def _mix(word: Any) -> Any:
    """Of an int, or of uint64 numbers, whose products wrap by themselves."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31
