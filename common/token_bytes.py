"""The bytes that each token of a vocabulary stands for, from a ``tokenizer.json``.

Two tokenizers write the same text in different ways: "Ġthe" in byte-level BPE is
"▁the" in SentencePiece. As bytes, tokens of both can be compared. Special tokens have
no bytes; they are known by their text.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import ModelError
from protocol.vocabulary import used_tokens

_BYTE = re.compile("<0x([0-9A-F]{2})>")
"""The tokens of SentencePiece for single bytes."""
_SPACE = "▁"


@dataclass(frozen=True)
class TokenBytes:
    """A vocabulary by its bytes.

    Attributes:
        ordinary: the bytes of each token that is text, by id, ascending; those for single bytes of characters
            without a token (SentencePiece) come last.
        special: the ids of special tokens, by their text.
        bos_token: the special token that starts a text, "" if there is none.
        eos_token: the special token that ends a text or a turn, "" if there is none.
    """

    ordinary: Mapping[int, bytes]
    special: Mapping[str, int]
    bos_token: str = ""
    eos_token: str = ""

    @classmethod
    def read(cls, path: Path, size: int, bos_token: str, eos_token: str) -> "TokenBytes":
        """The tokens of a ``tokenizer.json`` with ids below ``size``.

        Raises:
            ModelError: the file cannot be read, or its tokens do not stand for bytes.
        """
        try:
            ordinary, special = _tokens(json.loads(path.read_text(encoding="utf-8")), size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ModelError) as error:
            raise ModelError(f"the tokenizer {str(path)!r} cannot be used: {error}; use another model") from error
        return cls(ordinary, special, bos_token, eos_token)


def _tokens(content: Mapping[str, Any], size: int) -> tuple[dict[int, bytes], dict[str, int]]:
    """The ordinary and the special tokens of the content of a ``tokenizer.json``, with ids below ``size``."""
    entries = content["model"]["vocab"]
    names = entries if isinstance(entries, Mapping) else {name: index for index, (name, _) in enumerate(entries)}
    added = [token for token in content["added_tokens"] if token["id"] < size]
    special = {token["content"]: token["id"] for token in added if token["special"]}
    ordinary = {token["id"]: token["content"].encode() for token in added if not token["special"]}
    taken = {token["id"] for token in added}
    own = {index: token for index, token in used_tokens(names).items() if index < size and index not in taken}
    if "ByteLevel" in _types(content):
        return dict(sorted((ordinary | _of_byte_level(own)).items())), special
    singles = {index: bytes.fromhex(match[1]) for index, token in own.items() if (match := _BYTE.fullmatch(token))}
    if not singles:
        raise ModelError(
            f"its tokens, of type {content['model'].get('type')}, do not stand for bytes; "
            "allowed: byte-level BPE, or SentencePiece with byte fallback"
        )
    ordinary |= {index: token.replace(_SPACE, " ").encode() for index, token in own.items() if index not in singles}
    return dict(sorted(ordinary.items())) | singles, special


def _of_byte_level(tokens: Mapping[int, str]) -> dict[int, bytes]:
    """The bytes of tokens whose characters stand for bytes; a token with another character stands for its text."""
    table = _byte_level_alphabet()
    found = {}
    for token_id, token in tokens.items():
        try:
            found[token_id] = bytes(map(table.__getitem__, token))
        except KeyError:
            found[token_id] = token.encode()
    return found


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for.

    Printable characters of Latin-1 stand for themselves, the other bytes for characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _types(content: Mapping[str, Any]) -> set[str]:
    """The types of a tokenizer's pre-tokenizers and decoders."""
    parts, found = [content.get("pre_tokenizer"), content.get("decoder")], set()
    while parts:
        if part := parts.pop():
            found.add(part["type"])
            parts += [*part.get("pretokenizers", ()), *part.get("decoders", ())]
    return found
