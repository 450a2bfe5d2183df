"""Which token each id stands for: what draft and target model must agree on.

Ids that a model only pads its vocabulary with belong to neither the size nor the hash.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping

_PADDING = re.compile(r"\[PAD(\d+)\]")
"""The name that converters to GGUF give to an id without a token."""


def used_tokens(vocabulary: Mapping[str, int]) -> dict[int, str]:
    """The tokens by id, ascending, without padding.

    SentencePiece writes a space as "▁", converters to GGUF as a space: here it is "▁".
    """
    return {
        token_id: token.replace(" ", "▁")
        for token, token_id in sorted(vocabulary.items(), key=lambda item: item[1])
        if not ((match := _PADDING.fullmatch(token)) and int(match[1]) == token_id)
    }


def vocabulary_size(vocabulary: Mapping[str, int]) -> int:
    """The largest id in use, plus one."""
    return max(used_tokens(vocabulary), default=-1) + 1


def vocabulary_hash(vocabulary: Mapping[str, int], size: int | None = None) -> str:
    """SHA-256 (hex) of the ``[id, token]`` pairs in use below ``size``; None for all.

    A draft model may know fewer tokens than the target: those that it knows must be the target's first.
    """
    return _hash(entry for entry in used_tokens(vocabulary).items() if size is None or entry[0] < size)


def hash_with_padding(vocabulary: Mapping[str, int]) -> str:
    """The hash that protocol versions 1 and 2 compare: of all pairs, padding included."""
    return _hash(sorted((token_id, token) for token, token_id in vocabulary.items()))


def first_difference(one: Mapping[str, int], other: Mapping[str, int]) -> tuple[int, str, str] | None:
    """The first id that both use for different tokens, and these tokens; None where the common ids agree."""
    tokens, others = used_tokens(one), used_tokens(other)
    size = min(max(tokens, default=-1), max(others, default=-1)) + 1
    return next(
        (
            (token_id, tokens.get(token_id, ""), others.get(token_id, ""))
            for token_id in range(size)
            if tokens.get(token_id) != others.get(token_id)
        ),
        None,
    )


def hashed_text(entries: Iterable[tuple[int, str]]) -> bytes:
    """The JSON text of ``[id, token]`` pairs, of which SHA-256 is taken."""
    return json.dumps(list(entries), separators=(",", ":")).encode()


def _hash(entries: Iterable[tuple[int, str]]) -> str:
    return hashlib.sha256(hashed_text(entries)).hexdigest()
