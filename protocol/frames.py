"""Encode messages as frames and decode them; the only file that knows msgpack.

A frame is a msgpack array: a tag that identifies the message, then its fields in
order. Token ids are one binary field with max(8, ⌈log2 V⌉) bits per id. Decoding is
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
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

import msgpack

from protocol.draft_codec import DraftedTokens, EncodedDraft, decode_drafted, encode_drafted
from protocol.errors import FrameError, SettingsError
from protocol.fields import (
    BIAS,
    COUNTER,
    FLAG,
    NUMBER,
    SECONDS,
    FieldCodec,
    array_of,
    biases,
    binary,
    expect,
    grammar,
    id_bits,
    integer,
    logprobs,
    one_of,
    optional,
    text,
    token_ids,
)
from protocol.full_distribution import FullDistribution
from protocol.limits import MAX_DRAFT_LEN, Limits
from protocol.logprobs import MAX_LOGPROBS_BYTES
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
_MODE = one_of((Mode.IDS, Mode.TOPK, Mode.FULL, Mode.TARGET, Mode.COUPLED, Mode.TOPP))
_ENCODING = one_of((Encoding.SPARSE, Encoding.FP16))


@dataclass(frozen=True)
class _Layout:
    """The tag and the fields of a message; fields with a default may be omitted."""

    kind: type[Message]
    tag: int
    fields: tuple[FieldCodec, ...]

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
        self._draft_ids = token_ids(vocab_size, self.limits, "max_draft_len")
        self._token = integer(vocab_size - 1)
        layouts = self._make_layouts()
        self._by_kind = {layout.kind: layout for layout in layouts}
        self._by_tag = {layout.tag: layout for layout in layouts}
        self._kinds = {layout.tag: layout.kind for layout in layouts} | dict.fromkeys(_DRAFT_TAGS, Draft)

    @property
    def max_frame_bytes(self) -> int:
        """The length of the longest valid frame; a socket should refuse longer ones."""
        draft = self.limits.max_draft_len * (3 * self.vocab_size + 16)
        sampling = BIAS.size * MAX_BIASED_TOKENS + self.limits.max_grammar_len
        return max(draft, self.limits.max_prompt_len * id_bits(self.vocab_size) // 8 + sampling) + 1024

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
        return FrameHead(kind, COUNTER.unpack(first))

    def _make_layouts(self) -> list[_Layout]:
        counter, prompt = COUNTER, token_ids(self.vocab_size, self.limits, "max_prompt_len")
        limits = (array_of(_ENCODING), counter, counter, counter, counter, counter)
        vocabulary, pace = (counter, array_of(counter)), (SECONDS, SECONDS)
        sampling, welcome = self._sampling(), (counter, text(200), counter, counter, array_of(_MODE))
        return [
            _Layout(Hello, 0, (counter, counter, binary(32), array_of(counter))),
            _Layout(Welcome, 1, (*welcome, *limits, *vocabulary, *pace, counter, FLAG)),
            _Layout(Open, 2, (counter, counter, _MODE, sampling, prompt, counter, FLAG)),
            _Layout(Opened, 3, (counter, counter)),
            _Layout(Extend, 4, (counter, counter, counter, prompt, optional(sampling))),
            _Layout(Decode, 6, (counter, counter, counter)),
            _Layout(Verdict, 7, (counter, counter, counter, self._token, array_of(logprobs(self.vocab_size)))),
            _Layout(Close, 8, (counter,)),
            _Layout(Fault, 9, (optional(counter), text(40), text(MAX_FAULT_TEXT), counter)),
            _Layout(Resume, 11, (counter, counter, counter, binary(HASH_BYTES))),
            _Layout(Resumed, 12, (counter, counter, counter)),
        ]

    def _sampling(self) -> FieldCodec:
        """Temperature, top-k, top-p and seed in one binary field; with later settings an array that begins with it."""
        later = (
            *(NUMBER, NUMBER, NUMBER, NUMBER, biases(self.vocab_size), COUNTER, FLAG),
            *(array_of(self._token), grammar(self.limits), optional(COUNTER)),
        )
        entries = fields(Sampling)[-len(later) :]

        def pack_sampling(sampling: Sampling) -> Any:
            first = struct.pack("<dIdQ", sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed)
            packed = [codec.pack(getattr(sampling, entry.name)) for codec, entry in zip(later, entries, strict=True)]
            while packed and getattr(sampling, entries[len(packed) - 1].name) == entries[len(packed) - 1].default:
                packed.pop()
            return [first, *packed] if packed else first

        def unpack_sampling(value: object) -> Sampling:
            first, *rest = value if isinstance(value, list) and value else [value]
            packed = expect(bytes, first)
            values = [codec.unpack(entry) for codec, entry in zip(later, rest, strict=False)]
            try:
                return Sampling(*struct.unpack("<dIdQ", packed), *values)
            except (struct.error, SettingsError) as error:
                raise FrameError(f"sampling settings: {error}") from error

        return FieldCodec(pack_sampling, unpack_sampling)

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
        head = (COUNTER, COUNTER, self._token)[: 2 + pipelined]
        if len(values) < len(head):
            raise FrameError(f"Draft has {len(values)} fields; allowed: {len(head)} or more")
        session_id, round_id, *assumed_bonus = (codec.unpack(value) for codec, value in zip(head, values, strict=False))
        token_ids, distributions = self._unpack_drafted(values[len(head) :])
        return Draft(session_id, round_id, token_ids, distributions, assumed_bonus[0] if assumed_bonus else None)

    def _unpack_given(self, values: list[object]) -> Draft:
        if len(values) < 3:
            raise FrameError(f"Draft of given tokens has {len(values)} fields; allowed: 3 or more")
        session_id, round_id = (COUNTER.unpack(value) for value in values[:2])
        return Draft(session_id, round_id, self._draft_ids.unpack(values[2]), given=True)

    def _unpack_drafted(self, values: list[object]) -> tuple[tuple[int, ...], tuple[DraftDistribution, ...]]:
        match values:
            case []:
                return (), ()
            case [ids]:
                return self._draft_ids.unpack(ids), ()
            case [ids, fp16]:
                return self._unpack_fp16(self._draft_ids.unpack(ids), expect(bytes, fp16))
            case [draft_len, entries, steps, data]:
                sizes = [expect(int, value) for value in (draft_len, entries, steps)]
                return self._unpack_sparse(EncodedDraft(sizes[0], sizes[1], sizes[2], expect(bytes, data)))
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


def max_reply_bytes(limits: Limits) -> int:
    """The length of the longest reply: a Verdict with the log-probabilities of all its tokens, or a Fault."""
    verdict = (limits.max_draft_len + 1) * (MAX_LOGPROBS_BYTES + 2)
    return max(verdict, 4 * MAX_FAULT_TEXT) + 256
