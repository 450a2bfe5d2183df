"""Messages to bytes and back; the only file that knows msgpack.

A frame is a msgpack array: a tag that names the message, then its fields in
order. Token ids travel as one binary field of fixed width. Decoding is
validation: what it returns is a message both ends may rely on, and whatever is
wrong with the bytes raises FrameError before anything large is allocated.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeVar

import msgpack
import numpy as np

from protocol.errors import FrameError, SettingsError
from protocol.messages import (
    Close,
    Decode,
    Draft,
    Extend,
    Fault,
    Hello,
    Message,
    Mode,
    Open,
    Opened,
    Sampling,
    Verdict,
    Welcome,
)
from protocol.sparse import SparseDistribution

MAX_FAULT_TEXT = 1000
_MAX_COUNTER = 2**32 - 1
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class FrameLimits:
    """What a frame may hold: tokens of a prompt, tokens of a Draft."""

    max_prompt_len: int = 131_072
    max_draft_len: int = 64


@dataclass(frozen=True)
class _Field:
    """How one field of a message becomes a msgpack value and is checked on its way back."""

    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


_Schema: TypeAlias = dict[type[Message], tuple[int, tuple[_Field, ...]]]


class FrameCodec:
    """Bytes of messages about models with ``vocab_size`` tokens."""

    def __init__(self, vocab_size: int, limits: FrameLimits | None = None) -> None:
        self.vocab_size = vocab_size
        self.limits = limits or FrameLimits()
        self._id_bytes = max(2, -(-(vocab_size - 1).bit_length() // 8))
        self._schema = self._make_schema()
        self._by_tag = {tag: (kind, codecs) for kind, (tag, codecs) in self._schema.items()}

    @property
    def max_frame_bytes(self) -> int:
        """No honest frame is longer; a socket should refuse what is."""
        draft = self.limits.max_draft_len * (3 * self.vocab_size + 16)
        return max(draft, self.limits.max_prompt_len * self._id_bytes) + 1024

    def encode(self, message: Message) -> bytes:
        """The frame of ``message``."""
        tag, codecs = self._schema[type(message)]
        values = (getattr(message, entry.name) for entry in fields(message))
        frame: bytes = msgpack.packb([tag, *(codec.pack(value) for codec, value in zip(codecs, values, strict=True))])
        return frame

    def decode(self, frame: bytes) -> Message:
        """The message of ``frame``.

        Raises:
            FrameError: the bytes are no message, or a field of it is not allowed.
        """
        try:
            values = msgpack.unpackb(frame, max_array_len=4 * self.limits.max_draft_len + 16, max_map_len=0)
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise FrameError(f"{len(frame)} bytes are no msgpack array: {error}") from error
        if not isinstance(values, list) or not values or type(values[0]) is not int:
            raise FrameError("a frame must be an array that starts with its tag")
        if values[0] not in self._by_tag:
            raise FrameError(f"a frame has the tag {values[0]}; allowed: {sorted(self._by_tag)}")
        kind, codecs = self._by_tag[values[0]]
        if len(values) - 1 != len(codecs):
            raise FrameError(f"{kind.__name__} has {len(values) - 1} fields; allowed: {len(codecs)}")
        message = kind(*(codec.unpack(value) for codec, value in zip(codecs, values[1:], strict=True)))
        if isinstance(message, Draft):
            _check_draft(message)
        return message

    def _make_schema(self) -> _Schema:
        counter, prompt = _integer(_MAX_COUNTER), self._ids(self.limits.max_prompt_len)
        token, draft = _integer(self.vocab_size - 1), self._ids(self.limits.max_draft_len)
        distributions = _Field(self._pack_distributions, self._unpack_distributions)
        stop_ids = _array_of(_integer(_MAX_COUNTER))
        return {
            Hello: (0, (counter, counter, _binary(32), stop_ids)),
            Welcome: (1, (counter, _text(200), counter, counter, _array_of(_MODE))),
            Open: (2, (counter, counter, _MODE, _SAMPLING, prompt)),
            Opened: (3, (counter, counter)),
            Extend: (4, (counter, counter, counter, prompt)),
            Draft: (5, (counter, counter, draft, distributions)),
            Decode: (6, (counter, counter, counter)),
            Verdict: (7, (counter, counter, _integer(self.limits.max_draft_len), token)),
            Close: (8, (counter,)),
            Fault: (9, (_optional(counter), _text(40), _text(MAX_FAULT_TEXT))),
        }

    def _ids(self, max_count: int) -> _Field:
        width = self._id_bytes

        def pack(ids: tuple[int, ...]) -> bytes:
            return np.array(ids, "<u4").view(np.uint8).reshape(-1, 4)[:, :width].tobytes()

        def unpack(value: object) -> tuple[int, ...]:
            data = _expect(bytes, value)
            if len(data) % width or len(data) > width * max_count:
                raise FrameError(f"{len(data)} bytes of token ids; allowed: up to {max_count} ids of {width} bytes")
            padded = np.zeros((len(data) // width, 4), np.uint8)
            padded[:, :width] = np.frombuffer(data, np.uint8).reshape(-1, width)
            ids = padded.view("<u4")
            if ids.size and int(ids.max()) >= self.vocab_size:
                raise FrameError(f"token id {int(ids.max())}; allowed: 0 to {self.vocab_size - 1}")
            return tuple(ids.ravel().tolist())

        return _Field(pack, unpack)

    @staticmethod
    def _pack_distributions(distributions: tuple[SparseDistribution, ...]) -> list[int | bytes]:
        return [part for one in distributions for part in (len(one), one.encode())]

    def _unpack_distributions(self, value: object) -> tuple[SparseDistribution, ...]:
        parts = _expect(list, value)
        if len(parts) % 2 or len(parts) > 2 * self.limits.max_draft_len:
            raise FrameError(f"{len(parts)} parts of distributions; allowed: a count and bytes for each of them")
        return tuple(
            SparseDistribution.decode(_expect(bytes, data), self.vocab_size, _expect(int, count))
            for count, data in zip(parts[::2], parts[1::2], strict=True)
        )


def _check_draft(draft: Draft) -> None:
    if draft.distributions and len(draft.distributions) != len(draft.token_ids):
        raise FrameError(f"{len(draft.token_ids)} drafted tokens with {len(draft.distributions)} distributions")
    for token_id, distribution in zip(draft.token_ids, draft.distributions, strict=False):
        if distribution.probability(token_id) == 0:
            raise FrameError(f"token {token_id} was drafted from a distribution in which it is impossible")


def _expect(kind: type[_Value], value: object) -> _Value:
    if type(value) is not kind:  # a bool is no int here
        raise FrameError(f"a field is of type {type(value).__name__}; allowed: {kind.__name__}")
    return value


def _integer(largest: int) -> _Field:
    def unpack(value: object) -> int:
        number = _expect(int, value)
        if not 0 <= number <= largest:
            raise FrameError(f"a field is {number}; allowed: 0 to {largest}")
        return number

    return _Field(int, unpack)


def _text(max_len: int) -> _Field:
    def unpack(value: object) -> str:
        text = _expect(str, value)
        if len(text) > max_len:
            raise FrameError(f"a text of {len(text)} characters; allowed: {max_len}")
        return text

    return _Field(lambda text: text[:max_len], unpack)


def _binary(length: int) -> _Field:
    def unpack(value: object) -> bytes:
        data = _expect(bytes, value)
        if len(data) != length:
            raise FrameError(f"a field has {len(data)} bytes; allowed: {length}")
        return data

    return _Field(bytes, unpack)


def _optional(inner: _Field) -> _Field:
    return _Field(
        lambda value: None if value is None else inner.pack(value),
        lambda value: None if value is None else inner.unpack(value),
    )


def _array_of(inner: _Field) -> _Field:
    return _Field(
        lambda values: [inner.pack(value) for value in values],
        lambda value: tuple(inner.unpack(entry) for entry in _expect(list, value)),
    )


_MODES = (Mode.IDS, Mode.TOPK, Mode.FULL, Mode.TARGET, Mode.COUPLED)  # a mode's number on the wire is its place here


def _unpack_mode(value: object) -> Mode:
    return _MODES[int(_integer(len(_MODES) - 1).unpack(value))]


def _unpack_sampling(value: object) -> Sampling:
    data = _expect(bytes, value)
    try:
        return Sampling(*struct.unpack("<dIdQ", data))
    except (struct.error, SettingsError) as error:
        raise FrameError(f"sampling settings: {error}") from error


_MODE = _Field(_MODES.index, _unpack_mode)
_SAMPLING = _Field(
    lambda value: struct.pack("<dIdQ", value.temperature, value.top_k, value.top_p, value.seed),
    _unpack_sampling,
)
