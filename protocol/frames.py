"""Encode messages as frames and decode them; the only file that knows msgpack.

A frame is a msgpack array: a tag that identifies the message, then its fields in
order. Token ids are one binary field with ⌈log2 V⌉ bits per id. Decoding is
validation: a decoded message is valid, and invalid bytes raise FrameError before
anything large is allocated.

Fields are only ever appended. Trailing fields that hold their default are omitted,
and fields after the known ones are ignored, so the two ends may have different versions.

After its session, its round and its assumed bonus token, if any, a Draft has one of:

- nothing, if no tokens were drafted;
- the ids, in modes that send only ids;
- the numbers of tokens, entries and steps, and the bits of encoding ``sparse``
  (``draft_codec.py``);
- the ids, and all V probabilities of each token in FP16.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, TypeVar

import msgpack

from protocol.bits import BitReader, number_bits, pack
from protocol.draft_codec import DraftedTokens, EncodedDraft, decode_drafted, encode_drafted
from protocol.errors import FrameError, SettingsError
from protocol.full_distribution import FullDistribution
from protocol.limits import MAX_DRAFT_LEN, Limits
from protocol.logprobs import TokenLogprobs
from protocol.messages import (
    HASH_BYTES,
    MAX_BIASED_TOKENS,
    Close,
    Decode,
    Draft,
    DraftDistribution,
    Encoding,
    Extend,
    Fault,
    Hello,
    Message,
    Mode,
    Open,
    Opened,
    Resume,
    Resumed,
    Sampling,
    Verdict,
    Welcome,
)
from protocol.sparse import SparseDistribution

MAX_FAULT_TEXT = 1000
_MAX_ARRAY_LEN = MAX_DRAFT_LEN + 1
"""A Verdict has the log-probabilities of so many tokens."""
_MAX_ARRAYS = 64
"""Of a frame: arrays inside each other are built before any field is checked."""
_MAX_HEAD_BYTES = 64
_DRAFT_TAGS = _DRAFT_TAG, _PIPELINED_DRAFT_TAG, _GIVEN_DRAFT_TAG = 5, 10, 13
_MIN_ID_BITS = 8  # more than the padding of the last byte
_MAX_COUNTER = 2**32 - 1
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class _Field:
    """Converts one field of a message to a msgpack value, and back with validation."""

    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


@dataclass(frozen=True)
class _Layout:
    """The tag and the fields of a message; fields with a default may be omitted."""

    kind: type[Message]
    tag: int
    fields: tuple[_Field, ...]

    def pack(self, message: Message) -> list[Any]:
        entries = self._entries()
        while entries and getattr(message, entries[-1].name) == entries[-1].default:
            entries.pop()
        values = (getattr(message, entry.name) for entry in entries)
        return [self.tag, *(codec.pack(value) for codec, value in zip(self.fields, values, strict=False))]

    def unpack(self, values: list[object]) -> Message:
        required = sum(entry.default is MISSING for entry in self._entries())
        if len(values) < required:
            raise FrameError(f"{self.kind.__name__} has {len(values)} fields; allowed: {required} or more")
        return self.kind(*(codec.unpack(value) for codec, value in zip(self.fields, values, strict=False)))

    def _entries(self) -> list[Field[Any]]:
        return list(fields(self.kind)[: len(self.fields)])


@dataclass(frozen=True, slots=True)
class FrameHead:
    """The kind of a message, and the session that it names, None if it names none."""

    kind: type[Message]
    session_id: int | None


class FrameCodec:
    """Encodes and decodes messages for models with ``vocab_size`` tokens."""

    def __init__(self, vocab_size: int, limits: Limits | None = None) -> None:
        self.vocab_size = vocab_size
        self.limits = limits or Limits()
        self._id_bits = id_bits(vocab_size)
        self._draft_ids = self._ids("max_draft_len")
        self._counter = _integer(_MAX_COUNTER)
        self._token = _integer(vocab_size - 1)
        layouts = self._make_layouts()
        self._by_kind = {layout.kind: layout for layout in layouts}
        self._by_tag = {layout.tag: layout for layout in layouts}
        self._kinds = {layout.tag: layout.kind for layout in layouts} | dict.fromkeys(_DRAFT_TAGS, Draft)

    @property
    def max_frame_bytes(self) -> int:
        """The length of the longest valid frame; a socket should refuse longer ones."""
        draft = self.limits.max_draft_len * (3 * self.vocab_size + 16)
        sampling = _BIAS.size * MAX_BIASED_TOKENS + self.limits.max_grammar_len
        return max(draft, self.limits.max_prompt_len * self._id_bits // 8 + sampling) + 1024

    def encode(self, message: Message) -> bytes:
        """Encode a message."""
        values = self._pack_draft(message) if isinstance(message, Draft) else self._by_kind[type(message)].pack(message)
        frame: bytes = msgpack.packb(values)
        return frame

    def decode(self, frame: bytes) -> Message:
        """Decode a frame.

        Raises:
            FrameError: the bytes are not a valid message.
            LimitError: the message exceeds this codec's limits.
        """
        try:
            values = msgpack.unpackb(
                frame, max_array_len=_MAX_ARRAY_LEN, list_hook=_ArrayCount(), max_map_len=0, object_hook=_refuse_map
            )
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise FrameError(f"{len(frame)} bytes are not a msgpack array: {error}") from error
        if not isinstance(values, list) or not values or type(values[0]) is not int:
            raise FrameError("a frame must be an array that starts with its tag")
        tag, *rest = values
        if tag == _GIVEN_DRAFT_TAG:
            return self._unpack_given(rest)
        if tag in (_DRAFT_TAG, _PIPELINED_DRAFT_TAG):
            return self._unpack_draft(rest, pipelined=tag == _PIPELINED_DRAFT_TAG)
        if tag not in self._by_tag:
            raise FrameError(f"a frame has the tag {tag}; allowed: {sorted([*self._by_tag, *_DRAFT_TAGS])}")
        return self._by_tag[tag].unpack(rest)

    def head(self, frame: bytes) -> FrameHead:
        """Read the head of a frame; what follows it may be invalid.

        Raises:
            FrameError: the bytes do not start with the head of a message.
        """
        unpacker = msgpack.Unpacker(max_buffer_size=_MAX_HEAD_BYTES)
        unpacker.feed(frame[:_MAX_HEAD_BYTES])
        try:
            fields, tag = unpacker.read_array_header() - 1, unpacker.unpack()
            kind = self._kinds.get(tag) if type(tag) is int else None
            first = unpacker.unpack() if fields > 0 else None
        except (ValueError, msgpack.UnpackException) as error:
            raise FrameError(f"{len(frame)} bytes do not start with the head of a message: {error}") from error
        if kind is None:
            raise FrameError(f"a frame has the tag {tag!r:.20}; allowed: {sorted(self._kinds)}")
        if kind in (Hello, Welcome) or (kind is Fault and first is None):
            return FrameHead(kind, None)
        return FrameHead(kind, self._counter.unpack(first))

    def _make_layouts(self) -> list[_Layout]:
        counter, prompt = self._counter, self._ids("max_prompt_len")
        limits = (_array_of(_ENCODING), counter, counter, counter, counter, counter)
        vocabulary, pace = (counter, _array_of(counter)), (_SECONDS, _SECONDS)
        sampling, welcome = self._sampling(), (counter, _text(200), counter, counter, _array_of(_MODE))
        return [
            _Layout(Hello, 0, (counter, counter, _binary(32), _array_of(counter))),
            _Layout(Welcome, 1, (*welcome, *limits, *vocabulary, *pace, counter, _FLAG)),
            _Layout(Open, 2, (counter, counter, _MODE, sampling, prompt, counter, _FLAG)),
            _Layout(Opened, 3, (counter, counter)),
            _Layout(Extend, 4, (counter, counter, counter, prompt, _optional(sampling))),
            _Layout(Decode, 6, (counter, counter, counter)),
            _Layout(Verdict, 7, (counter, counter, counter, self._token, _array_of(self._logprobs()))),
            _Layout(Close, 8, (counter,)),
            _Layout(Fault, 9, (_optional(counter), _text(40), _text(MAX_FAULT_TEXT), counter)),
            _Layout(Resume, 11, (counter, counter, counter, _binary(HASH_BYTES))),
            _Layout(Resumed, 12, (counter, counter, counter)),
        ]

    def _sampling(self) -> _Field:
        """Temperature, top-k, top-p and seed in one binary field; with later settings an array that begins with it."""
        stop_ids = _array_of(self._token)
        grammar, logprobs = self._grammar(), _optional(self._counter)
        numbers = (_NUMBER, _NUMBER, _NUMBER, _NUMBER)
        later = (*numbers, self._biases(), self._counter, _FLAG, stop_ids, grammar, logprobs)
        entries = fields(Sampling)[-len(later) :]

        def pack_sampling(sampling: Sampling) -> Any:
            first = struct.pack("<dIdQ", sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed)
            packed = [codec.pack(getattr(sampling, entry.name)) for codec, entry in zip(later, entries, strict=True)]
            while packed and getattr(sampling, entries[len(packed) - 1].name) == entries[len(packed) - 1].default:
                packed.pop()
            return [first, *packed] if packed else first

        def unpack_sampling(value: object) -> Sampling:
            first, *rest = value if isinstance(value, list) and value else [value]
            packed = _expect(bytes, first)
            values = [codec.unpack(entry) for codec, entry in zip(later, rest, strict=False)]
            try:
                return Sampling(*struct.unpack("<dIdQ", packed), *values)
            except (struct.error, SettingsError) as error:
                raise FrameError(f"sampling settings: {error}") from error

        return _Field(pack_sampling, unpack_sampling)

    def _grammar(self) -> _Field:
        """A text whose length in UTF-8 is limited."""

        def unpack(value: object) -> str:
            text = _expect(str, value)
            self.limits.check("max_grammar_len", len(text.encode()))
            return text

        return _Field(str, unpack)

    def _logprobs(self) -> _Field:
        return _Field(TokenLogprobs.encode, lambda value: TokenLogprobs.decode(_expect(bytes, value), self.vocab_size))

    def _biases(self) -> _Field:
        """Pairs of a token id and its bias, 8 bytes each."""

        def unpack(value: object) -> tuple[tuple[int, float], ...]:
            data = _expect(bytes, value)
            if len(data) > _BIAS.size * MAX_BIASED_TOKENS or len(data) % _BIAS.size:
                raise FrameError(f"{len(data)} bytes of biases; allowed: {_BIAS.size} for each token")
            pairs = tuple(_BIAS.iter_unpack(data))
            if any(token_id >= self.vocab_size for token_id, _ in pairs):
                raise FrameError(f"a bias of a token id above {self.vocab_size - 1}")
            return pairs

        return _Field(lambda pairs: b"".join(_BIAS.pack(*pair) for pair in pairs), unpack)

    def _ids(self, limit: str) -> _Field:
        width = self._id_bits

        def unpack(value: object) -> tuple[int, ...]:
            data = _expect(bytes, value)
            count = 8 * len(data) // width
            self.limits.check(limit, count)
            reader = BitReader(data)
            ids = reader.numbers(count, width)
            reader.finish()
            if count and ids.max() >= self.vocab_size:
                raise FrameError(f"token id {ids.max()}; allowed: 0 to {self.vocab_size - 1}")
            return tuple(ids.tolist())

        return _Field(lambda ids: pack([number_bits(ids, width)]), unpack)

    def _pack_draft(self, draft: Draft) -> list[Any]:
        head = [_DRAFT_TAG, draft.session_id, draft.round_id]
        if draft.assumed_bonus is not None:
            head = [_PIPELINED_DRAFT_TAG, draft.session_id, draft.round_id, draft.assumed_bonus]
        if draft.given:
            head = [_GIVEN_DRAFT_TAG, draft.session_id, draft.round_id]
        return [*head, *self._pack_drafted(draft)]

    def _pack_drafted(self, draft: Draft) -> list[int | bytes]:
        if not draft.token_ids:
            return []
        if not draft.distributions:
            return [self._draft_ids.pack(draft.token_ids)]
        full = [one for one in draft.distributions if isinstance(one, FullDistribution)]
        if full:
            return [self._draft_ids.pack(draft.token_ids), b"".join(one.encode() for one in full)]
        sparse = [one for one in draft.distributions if isinstance(one, SparseDistribution)]
        encoded = encode_drafted(draft.token_ids, sparse)
        return [encoded.draft_len, encoded.entries, encoded.steps, encoded.data]

    def _unpack_draft(self, values: list[object], pipelined: bool) -> Draft:
        head = (self._counter, self._counter, self._token)[: 2 + pipelined]
        if len(values) < len(head):
            raise FrameError(f"Draft has {len(values)} fields; allowed: {len(head)} or more")
        session_id, round_id, *assumed_bonus = (codec.unpack(value) for codec, value in zip(head, values, strict=False))
        token_ids, distributions = self._unpack_drafted(values[len(head) :])
        return Draft(session_id, round_id, token_ids, distributions, assumed_bonus[0] if assumed_bonus else None)

    def _unpack_given(self, values: list[object]) -> Draft:
        if len(values) < 3:
            raise FrameError(f"Draft of given tokens has {len(values)} fields; allowed: 3 or more")
        session_id, round_id = (self._counter.unpack(value) for value in values[:2])
        return Draft(session_id, round_id, self._draft_ids.unpack(values[2]), given=True)

    def _unpack_drafted(self, values: list[object]) -> tuple[tuple[int, ...], tuple[DraftDistribution, ...]]:
        match values:
            case []:
                return (), ()
            case [ids]:
                return self._draft_ids.unpack(ids), ()
            case [ids, fp16]:
                return self._unpack_fp16(self._draft_ids.unpack(ids), _expect(bytes, fp16))
            case [draft_len, entries, steps, data]:
                sizes = [_expect(int, value) for value in (draft_len, entries, steps)]
                return self._unpack_sparse(EncodedDraft(sizes[0], sizes[1], sizes[2], _expect(bytes, data)))
        raise FrameError(f"Draft has {len(values)} fields of drafted tokens; allowed: 0, 1, 2 or 4")

    def _unpack_sparse(self, encoded: EncodedDraft) -> DraftedTokens:
        self.limits.check("max_draft_len", encoded.draft_len)
        self.limits.check("max_uplink_k", -(-encoded.entries // max(1, encoded.draft_len)))
        token_ids, distributions = decode_drafted(encoded, self.vocab_size)
        self.limits.check("max_uplink_k", max(map(len, distributions)))
        return token_ids, distributions

    def _unpack_fp16(
        self, token_ids: tuple[int, ...], fp16: bytes
    ) -> tuple[tuple[int, ...], tuple[FullDistribution, ...]]:
        size = 2 * self.vocab_size
        if len(fp16) != len(token_ids) * size:
            raise FrameError(
                f"{len(fp16)} bytes of probabilities for {len(token_ids)} drafted tokens; allowed: {size} for each"
            )
        distributions = FullDistribution.decode(fp16, self.vocab_size)
        for token_id, one in zip(token_ids, distributions, strict=True):
            if one.fp16[token_id] == 0:
                raise FrameError(f"drafted token {token_id} has probability 0 in its distribution")
        return token_ids, distributions


def id_bits(vocab_size: int) -> int:
    """Bits of an encoded token id."""
    return max(_MIN_ID_BITS, (vocab_size - 1).bit_length())


def _expect(kind: type[_Value], value: object) -> _Value:
    if type(value) is not kind:  # a bool is not accepted as an int
        raise FrameError(f"a field is of type {type(value).__name__}; allowed: {kind.__name__}")
    return value


def _integer(largest: int) -> _Field:
    def unpack(value: object) -> int:
        number = _expect(int, value)
        if not 0 <= number <= largest:
            raise FrameError(f"a field is {number}; allowed: 0 to {largest}")
        return number

    return _Field(int, unpack)


class _ArrayCount:
    """Counts the arrays of a frame while msgpack builds them, the inner ones first."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, values: list[Any]) -> list[Any]:
        self._count += 1
        if self._count > _MAX_ARRAYS:
            raise ValueError(f"more than {_MAX_ARRAYS} arrays")
        return values


def _refuse_map(_: dict[Any, Any]) -> None:
    raise ValueError("a map; allowed: arrays")


def _unpack_seconds(value: object) -> float:
    seconds = _expect(float, value)
    if not 0 <= seconds <= _MAX_COUNTER:  # NaN compares false
        raise FrameError(f"a time is {seconds}; allowed: 0 to {_MAX_COUNTER} seconds")
    return seconds


def _text(max_len: int) -> _Field:
    """A text for people: line breaks and escape sequences, which could forge log lines, become a space or "�"."""

    def unpack(value: object) -> str:
        text = _expect(str, value)
        if len(text) > max_len:
            raise FrameError(f"a text of {len(text)} characters; allowed: {max_len}")
        return "".join(mark if mark.isprintable() else " " if mark.isspace() else "�" for mark in text)

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


# A mode's number on the wire is its index: append only.
_MODES = (Mode.IDS, Mode.TOPK, Mode.FULL, Mode.TARGET, Mode.COUPLED, Mode.TOPP)
# An encoding's number on the wire is its index: append only.
_ENCODINGS = (Encoding.SPARSE, Encoding.FP16)


def _one_of(choices: Sequence[Any]) -> _Field:
    index = _integer(len(choices) - 1)
    return _Field(choices.index, lambda value: choices[index.unpack(value)])


_SECONDS = _Field(float, _unpack_seconds)
_MODE = _one_of(_MODES)
_ENCODING = _one_of(_ENCODINGS)
_NUMBER = _Field(float, lambda value: _expect(float, value))
_FLAG = _Field(bool, lambda value: _expect(bool, value))
_BIAS = struct.Struct("<If")
