"""What a GGUF file says about its vocabulary: tokens, their types, and the ids that end an answer.

Knows the file's metadata and the shapes of its tensors; not how text is encoded.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Any

from protocol.errors import ModelError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Struct format of each type of number in the file."""
_TEXT, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_WANTED = ("general.architecture", "tokenizer.")
_ROLES = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "pad": "padding", "unk": "unknown"}
"""Special tokens, by their names in transformers, and their names in the file."""


class TokenType(IntEnum):
    """The file's ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class GgufVocabulary:
    """The metadata below ``tokenizer.ggml`` and the chat template.

    ``scores`` and ``merges`` are empty where the file has none; ``add_bos`` and
    ``add_space_prefix`` are None where it does not say.
    """

    architecture: str
    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    special_ids: Mapping[str, int]
    add_bos: bool | None
    add_space_prefix: bool | None
    chat_template: str | None

    @classmethod
    def read(cls, path: Path) -> "GgufVocabulary":
        """Read the metadata of the file at ``path``.

        Raises:
            ModelError: the file is damaged, or has no vocabulary.
        """
        with _open(path) as reader:
            _, fields = _metadata(reader)
        tokens = _array(fields, "tokens", path)
        if not tokens:
            raise ModelError(f"{str(path)!r} holds no tokens (tokenizer.ggml.tokens); name a file with a vocabulary")
        model = fields.get("tokenizer.ggml.model", "")
        types = _array(fields, "token_type", path, len(tokens)) or [TokenType.NORMAL] * len(tokens)
        return cls(
            architecture=fields.get("general.architecture", ""),
            model=model,
            pre=fields.get("tokenizer.ggml.pre", "default"),
            tokens=_with_spaces(tokens, types) if model == "llama" else tokens,
            types=types,
            scores=_array(fields, "scores", path, len(tokens)),
            merges=_array(fields, "merges", path),
            special_ids=_special_ids(fields, len(tokens), path),
            add_bos=fields.get("tokenizer.ggml.add_bos_token"),
            add_space_prefix=fields.get("tokenizer.ggml.add_space_prefix"),
            chat_template=fields.get("tokenizer.chat_template"),
        )

    @property
    def added_tokens(self) -> dict[str, int]:
        """The ids of control and user-defined tokens."""
        return {self.tokens[token_id]: token_id for token_id in self.of_type(TokenType.CONTROL, TokenType.USER_DEFINED)}

    def of_type(self, *types: TokenType) -> list[int]:
        """The ids of the tokens of these types."""
        return [token_id for token_id, kind in enumerate(self.types) if kind in types]


class _Reader:
    """Reads the values of a file one after the other."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._offset = 0

    def raw(self, size: int) -> bytes:
        start, self._offset = self._offset, self._offset + size
        if self._offset > len(self._content):
            raise ValueError("it ends within the metadata")
        return self._content[start : self._offset]

    def numbers(self, form: str, count: int) -> list[Any]:
        layout = struct.Struct(f"<{count}{form}")
        return list(layout.unpack(self.raw(layout.size)))

    def number(self, form: str) -> Any:
        return self.numbers(form, 1)[0]

    def text(self) -> str:
        return self.raw(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(_number_form(kind))
        kind, count = self.number("I"), self.number("Q")
        if kind == _TEXT:
            return [self.text() for _ in range(count)]
        return self.numbers(_number_form(kind), count)


def _number_form(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"its metadata has a value of type {kind}; allowed: {sorted({*_NUMBERS, _TEXT, _ARRAY})}")
    return _NUMBERS[kind]


def gguf_parameters(path: Path) -> int:
    """The parameters in all tensors of the file at ``path``.

    Raises:
        ModelError: the file is damaged.
    """
    with _open(path) as reader:
        tensors, _ = _metadata(reader)
        return sum(_tensor_parameters(reader) for _ in range(tensors))


@contextmanager
def _open(path: Path) -> Iterator[_Reader]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield _Reader(content)
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{str(path)!r} cannot be read as GGUF: {error}; download or convert it again") from error


def _metadata(reader: _Reader) -> tuple[int, dict[str, Any]]:
    """The number of tensors, and the fields that are wanted."""
    if (magic := reader.raw(4)) != b"GGUF":
        raise ValueError(f"it begins with {magic!r}; allowed: b'GGUF'")
    if (version := reader.number("I")) not in _VERSIONS:
        raise ValueError(f"it has version {version}; allowed: {', '.join(map(str, _VERSIONS))}")
    tensors, count = reader.numbers("Q", 2)
    fields = {}
    for _ in range(count):
        name, value = reader.text(), reader.value(reader.number("I"))
        if name.startswith(_WANTED):
            fields[name] = value
    return tensors, fields


def _tensor_parameters(reader: _Reader) -> int:
    """Of the next tensor, which has a name, its dimensions, a type and an offset."""
    reader.text()
    parameters: int = prod(reader.numbers("Q", reader.number("I")))
    reader.raw(struct.calcsize("<IQ"))
    return parameters


def _array(fields: Mapping[str, Any], name: str, path: Path, size: int | None = None) -> list[Any]:
    """The array ``tokenizer.ggml.{name}``, empty if there is none.

    Raises:
        ModelError: it is no array, or not of ``size`` values.
    """
    values = fields.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(values, list) or (values and size not in (None, len(values))):
        held = f"{len(values)} values" if isinstance(values, list) else repr(values)
        wanted = "an array" if size is None else f"one value for each of the {size} tokens"
        raise ModelError(f"tokenizer.ggml.{name} of {str(path)!r} is {held}; allowed: {wanted}; convert the file again")
    return values


def _special_ids(fields: Mapping[str, Any], size: int, path: Path) -> dict[str, int]:
    ids = {}
    for role, name in _ROLES.items():
        token_id = fields.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < size:
            raise ModelError(
                f"tokenizer.ggml.{name}_token_id of {str(path)!r} is {token_id!r}; allowed: 0 to {size - 1}; "
                "correct it in the file"
            )
        ids[role] = token_id
    return ids


def _with_spaces(tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """The tokens; in user-defined ones "▁" is a space, as converters write it today and older ones did not."""
    return [
        token.replace("▁", " ") if kind == TokenType.USER_DEFINED else token
        for token, kind in zip(tokens, types, strict=True)
    ]
