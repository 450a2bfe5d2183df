"""Log-probabilities of the target, before any sampling setting: of a token, and of the likeliest at its position."""

import math
import struct
from dataclasses import dataclass
from typing import Self

from protocol.errors import FrameError

MAX_TOP_LOGPROBS = 20
_LOGPROB = struct.Struct("<f")
_TOP = struct.Struct("<If")
MAX_LOGPROBS_BYTES = _LOGPROB.size + MAX_TOP_LOGPROBS * _TOP.size


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The natural logarithm of a token's probability, and pairs of the likeliest ids and theirs; float32."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def encode(self) -> bytes:
        """4 bytes, and 8 for each of ``top``."""
        return _LOGPROB.pack(self.logprob) + b"".join(_TOP.pack(*pair) for pair in self.top)

    @classmethod
    def decode(cls, data: bytes, vocab_size: int) -> Self:
        """The inverse of ``encode``.

        Raises:
            FrameError: the bytes are not valid.
        """
        if len(data) % _TOP.size != _LOGPROB.size or len(data) > MAX_LOGPROBS_BYTES:
            raise FrameError(f"log-probabilities of {len(data)} bytes; allowed: 4, and 8 for each of up to 20 tokens")
        found = cls(_LOGPROB.unpack_from(data)[0], tuple(_TOP.iter_unpack(data[_LOGPROB.size :])))
        if any(token_id >= vocab_size for token_id, _ in found.top):
            raise FrameError(f"a log-probability of a token id above {vocab_size - 1}")
        if any(math.isnan(logprob) for logprob in (found.logprob, *(logprob for _, logprob in found.top))):
            raise FrameError("a log-probability is NaN")
        return found
