"""The target's vocabulary, as devices must match it."""

import hashlib
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from protocol.vocabulary import hash_with_padding, hashed_text, used_tokens, vocabulary_size

_KEPT_HASHES = 16


@dataclass(frozen=True)
class Vocabulary:
    """The target's tokens and stop ids.

    Attributes:
        tokens: map of token to id.
        rows: of the model's output layer; ids beyond are never sampled.
        stop_ids: the ids that end an answer; those that the target cannot sample are left out.
        size: ids that the target may sample, padding included; frames encode ids for so many tokens.
        used_size: ids in use, without padding; a draft model may know the first of these.
    """

    tokens: Mapping[str, int] = field(repr=False, hash=False)
    rows: int
    stop_ids: frozenset[int]
    size: int = field(init=False)
    used_size: int = field(init=False)
    _hashed: "_HashedTokens" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", min(max(self.tokens.values()) + 1, self.rows))
        object.__setattr__(self, "stop_ids", frozenset(one for one in self.stop_ids if one < self.size))
        object.__setattr__(self, "used_size", min(vocabulary_size(self.tokens), self.rows))
        object.__setattr__(self, "_hashed", _HashedTokens(self.tokens))

    def hash_of_first(self, size: int) -> bytes:
        """SHA-256 of the tokens in use with ids below ``size``: what a draft model with so many tokens must have."""
        return self._hashed.of_first(size)

    @property
    def hash_with_padding(self) -> bytes:
        """SHA-256 as protocol versions 1 and 2 compare it."""
        return self._hashed.with_padding


class _HashedTokens:
    """The hashes of one vocabulary.

    Any peer may ask for the hash of any number of tokens, so the text that is hashed is made only once;
    the hashes of the last few numbers are kept, because devices greet often and most have the same bundle.
    """

    def __init__(self, tokens: Mapping[str, int]) -> None:
        used = used_tokens(tokens)
        self._ids = list(used)
        self._text = hashed_text(used.items())
        self._ends = [0]
        for entry in used.items():
            self._ends.append(self._ends[-1] + len(hashed_text([entry])) - 1)
        self.with_padding = bytes.fromhex(hash_with_padding(tokens))
        self.of_first = lru_cache(_KEPT_HASHES)(self._of_first)

    def _of_first(self, size: int) -> bytes:
        """SHA-256 of the tokens with ids below ``size``."""
        count = bisect_left(self._ids, size)
        text = self._text[: self._ends[count]] if count else b"["
        return hashlib.sha256(text + b"]").digest()
