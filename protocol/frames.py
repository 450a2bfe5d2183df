"""Messages to bytes and back; the only file that knows msgpack.

A frame is a msgpack array: a tag that names the message, then its fields in
order. Token ids travel as one binary field of ⌈log2 V⌉ bits each. Decoding is
validation: what it returns is a message both ends may rely on, and whatever is
wrong with the bytes raises FrameError before anything large is allocated.

After its session and round a Draft has one of these:

- nothing, where nothing was drafted;
- the ids, in modes that send ids alone;
- how many tokens, entries and steps there are, and their bits (``drafted.py``);
- the ids, and all V probabilities of each in FP16.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeVar

import msgpack

from protocol.bits import BitReader, number_bits, pack
from protocol.drafted import Drawn, PackedDraft, pack_drawn, unpack_drawn
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
_MAX_ARRAY_LEN = 256
_MIN_ID_BITS = 8  # so that what fills the last byte is no id
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
        self._id_bits = max(_MIN_ID_BITS, (vocab_size - 1).bit_length())
        self._draft_ids = self._ids(self.limits.max_draft_len)
        self._schema = self._make_schema()
        self._by_tag = {tag: (kind, codecs) for kind, (tag, codecs) in self._schema.items()}

    @property
    def max_frame_bytes(self) -> int:
        """No honest frame is longer; a socket should refuse what is."""
        draft = self.limits.max_draft_len * (3 * self.vocab_size + 16)
        return max(draft, self.limits.max_prompt_len * self._id_bits // 8) + 1024

    def encode(self, message: Message) -> bytes:
        """The frame of ``message``."""
        tag, codecs = self._schema[type(message)]
        values = (getattr(message, entry.name) for entry in fields(message)[: len(codecs)])
        packed = [codec.pack(value) for codec, value in zip(codecs, values, strict=True)]
        drawn = self._pack_drawn(message) if isinstance(message, Draft) else []
        frame: bytes = msgpack.packb([tag, *packed, *drawn])
        return frame

    def decode(self, frame: bytes) -> Message:
        """The message of ``frame``.

        Raises:
            FrameError: the bytes are no message, or a field of it is not allowed.
        """
        try:
            values = msgpack.unpackb(frame, max_array_len=_MAX_ARRAY_LEN, max_map_len=0)
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise FrameError(f"{len(frame)} bytes are no msgpack array: {error}") from error
        if not isinstance(values, list) or not values or type(values[0]) is not int:
            raise FrameError("a frame must be an array that starts with its tag")
        if values[0] not in self._by_tag:
            raise FrameError(f"a frame has the tag {values[0]}; allowed: {sorted(self._by_tag)}")
        kind, codecs = self._by_tag[values[0]]
        if len(values) - 1 != len(codecs) and not (kind is Draft and len(values) > len(codecs)):
            raise FrameError(f"{kind.__name__} has {len(values) - 1} fields; allowed: {len(codecs)}")
        unpacked = [codec.unpack(value) for codec, value in zip(codecs, values[1:], strict=False)]
        drawn = self._unpack_drawn(values[1 + len(codecs) :]) if kind is Draft else ()
        return kind(*unpacked, *drawn)

    def _make_schema(self) -> _Schema:
        counter, prompt = _integer(_MAX_COUNTER), self._ids(self.limits.max_prompt_len)
        token = _integer(self.vocab_size - 1)
        stop_ids = _array_of(_integer(_MAX_COUNTER))
        return {
            Hello: (0, (counter, counter, _binary(32), stop_ids)),
            Welcome: (1, (counter, _text(200), counter, counter, _array_of(_MODE))),
            Open: (2, (counter, counter, _MODE, _SAMPLING, prompt)),
            Opened: (3, (counter, counter)),
            Extend: (4, (counter, counter, counter, prompt)),
            Draft: (5, (counter, counter)),  # and what was drawn
            Decode: (6, (counter, counter, counter)),
            Verdict: (7, (counter, counter, _integer(self.limits.max_draft_len), token)),
            Close: (8, (counter,)),
            Fault: (9, (_optional(counter), _text(40), _text(MAX_FAULT_TEXT))),
        }

    def _ids(self, max_count: int) -> _Field:
        width = self._id_bits

        def unpack(value: object) -> tuple[int, ...]:
            data = _expect(bytes, value)
            count = 8 * len(data) // width
            if count > max_count:
                raise FrameError(f"{len(data)} bytes of token ids; allowed: up to {max_count} ids of {width} bits")
            reader = BitReader(data)
            ids = reader.numbers(count, width)
            reader.finish()
            if count and ids.max() >= self.vocab_size:
                raise FrameError(f"token id {ids.max()}; allowed: 0 to {self.vocab_size - 1}")
            return tuple(ids.tolist())

        return _Field(lambda ids: pack([number_bits(ids, width)]), unpack)

    def _pack_drawn(self, draft: Draft) -> list[int | bytes]:
        if not draft.token_ids:
            return []
        if not draft.distributions:
            return [self._draft_ids.pack(draft.token_ids)]
        if draft.distributions[0].whole:
            halves = b"".join(one.encode_halves() for one in draft.distributions)
            return [self._draft_ids.pack(draft.token_ids), halves]
        packed = pack_drawn(draft.token_ids, draft.distributions)
        return [packed.draft_len, packed.entries, packed.steps, packed.data]

    def _unpack_drawn(self, values: list[object]) -> Drawn:
        match values:
            case []:
                return (), ()
            case [ids]:
                return self._draft_ids.unpack(ids), ()
            case [ids, halves]:
                return self._unpack_whole(self._draft_ids.unpack(ids), _expect(bytes, halves))
            case [draft_len, entries, steps, data]:
                sizes = [_expect(int, value) for value in (draft_len, entries, steps)]
                packed = PackedDraft(sizes[0], sizes[1], sizes[2], _expect(bytes, data))
                return unpack_drawn(packed, self.vocab_size, self.limits.max_draft_len)
        raise FrameError(f"Draft has {2 + len(values)} fields; allowed: 2, 3, 4 or 6")

    def _unpack_whole(self, token_ids: tuple[int, ...], halves: bytes) -> Drawn:
        size = 2 * self.vocab_size
        if len(halves) != len(token_ids) * size:
            raise FrameError(
                f"{len(halves)} bytes of probabilities for {len(token_ids)} drafted tokens; allowed: {size} for each"
            )
        distributions = tuple(
            SparseDistribution.decode_halves(halves[start : start + size]) for start in range(0, len(halves), size)
        )
        for token_id, one in zip(token_ids, distributions, strict=True):
            if one.probability(token_id) == 0:
                raise FrameError(f"token {token_id} was drafted from a distribution in which it is impossible")
        return token_ids, distributions


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


# A mode's number on the wire is its place here.
_MODES = (Mode.IDS, Mode.TOPK, Mode.FULL, Mode.TARGET, Mode.COUPLED, Mode.TOPP)


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
