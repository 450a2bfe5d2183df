"""The fields of messages: each becomes a msgpack value, and is checked when it comes back."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from protocol.bits import BitReader, number_bits, pack
from protocol.errors import FrameError
from protocol.limits import Limits
from protocol.logprobs import TokenLogprobs
from protocol.messages import MAX_BIASED_TOKENS

MAX_COUNTER = 2**32 - 1
BIAS = struct.Struct("<If")
"""A token id and its bias."""
_MIN_ID_BITS = 8  # more than the padding of the last byte
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class FieldCodec:
    """Converts one field of a message to a msgpack value, and back with validation."""

    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


def expect(kind: type[_Value], value: object) -> _Value:
    """Return the value if it is of this type.

    Raises:
        FrameError: it is of another type.
    """
    if type(value) is not kind:  # a bool is not accepted as an int
        raise FrameError(f"a field is of type {type(value).__name__}; allowed: {kind.__name__}")
    return value


def integer(largest: int) -> FieldCodec:
    """An integer from 0 to ``largest``."""

    def unpack(value: object) -> int:
        number = expect(int, value)
        if not 0 <= number <= largest:
            raise FrameError(f"a field is {number}; allowed: 0 to {largest}")
        return number

    return FieldCodec(int, unpack)


def text(max_len: int) -> FieldCodec:
    """A text for people: line breaks and escape sequences, which could forge log lines, become a space or "�"."""

    def unpack(value: object) -> str:
        characters = expect(str, value)
        if len(characters) > max_len:
            raise FrameError(f"a text of {len(characters)} characters; allowed: {max_len}")
        return "".join(one if one.isprintable() else " " if one.isspace() else "�" for one in characters)

    return FieldCodec(lambda characters: characters[:max_len], unpack)


def binary(length: int) -> FieldCodec:
    """So many bytes."""

    def unpack(value: object) -> bytes:
        data = expect(bytes, value)
        if len(data) != length:
            raise FrameError(f"a field has {len(data)} bytes; allowed: {length}")
        return data

    return FieldCodec(bytes, unpack)


def optional(inner: FieldCodec) -> FieldCodec:
    """A field that may be None."""
    return FieldCodec(
        lambda value: None if value is None else inner.pack(value),
        lambda value: None if value is None else inner.unpack(value),
    )


def array_of(inner: FieldCodec) -> FieldCodec:
    """A tuple of values of one kind."""
    return FieldCodec(
        lambda values: [inner.pack(value) for value in values],
        lambda value: tuple(inner.unpack(entry) for entry in expect(list, value)),
    )


def one_of(choices: Sequence[Any]) -> FieldCodec:
    """One of the choices, as its index: append to the choices only."""
    index = integer(len(choices) - 1)
    return FieldCodec(choices.index, lambda value: choices[index.unpack(value)])


def token_ids(vocab_size: int, limits: Limits, limit: str) -> FieldCodec:
    """Token ids of a model with ``vocab_size`` tokens, ``id_bits`` each, as many as the limit of this name allows."""
    width = id_bits(vocab_size)

    def unpack(value: object) -> tuple[int, ...]:
        data = expect(bytes, value)
        count = 8 * len(data) // width
        limits.check(limit, count)
        reader = BitReader(data)
        ids = reader.numbers(count, width)
        reader.finish()
        if count and ids.max() >= vocab_size:
            raise FrameError(f"token id {ids.max()}; allowed: 0 to {vocab_size - 1}")
        return tuple(ids.tolist())

    return FieldCodec(lambda ids: pack([number_bits(ids, width)]), unpack)


def id_bits(vocab_size: int) -> int:
    """Bits of an encoded token id."""
    return max(_MIN_ID_BITS, (vocab_size - 1).bit_length())


def biases(vocab_size: int) -> FieldCodec:
    """Pairs of a token id and its bias, 8 bytes each."""

    def unpack(value: object) -> tuple[tuple[int, float], ...]:
        data = expect(bytes, value)
        if len(data) > BIAS.size * MAX_BIASED_TOKENS or len(data) % BIAS.size:
            raise FrameError(f"{len(data)} bytes of biases; allowed: {BIAS.size} for each token")
        pairs = tuple(BIAS.iter_unpack(data))
        if any(token_id >= vocab_size for token_id, _ in pairs):
            raise FrameError(f"a bias of a token id above {vocab_size - 1}")
        return pairs

    return FieldCodec(lambda pairs: b"".join(BIAS.pack(*pair) for pair in pairs), unpack)


def grammar(limits: Limits) -> FieldCodec:
    """A text whose length in UTF-8 is limited."""

    def unpack(value: object) -> str:
        source = expect(str, value)
        limits.check("max_grammar_len", len(source.encode()))
        return source

    return FieldCodec(str, unpack)


def logprobs(vocab_size: int) -> FieldCodec:
    """The log-probabilities of a token."""
    return FieldCodec(TokenLogprobs.encode, lambda value: TokenLogprobs.decode(expect(bytes, value), vocab_size))


def _unpack_seconds(value: object) -> float:
    seconds = expect(float, value)
    if not 0 <= seconds <= MAX_COUNTER:  # NaN compares false
        raise FrameError(f"a time is {seconds}; allowed: 0 to {MAX_COUNTER} seconds")
    return seconds


COUNTER = integer(MAX_COUNTER)
SECONDS = FieldCodec(float, _unpack_seconds)
NUMBER = FieldCodec(float, lambda value: expect(float, value))
FLAG = FieldCodec(bool, lambda value: expect(bool, value))
