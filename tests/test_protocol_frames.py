"""Frames: every message round-trips; any other bytes raise FrameError or LimitError."""

import tracemalloc
from dataclasses import MISSING, astuple, fields
from typing import Any, get_args

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.errors import FrameError, LimitError, ProtocolError, SettingsError
from protocol.frames import MAX_FAULT_TEXT, FrameCodec, max_reply_bytes
from protocol.full_distribution import FullDistribution
from protocol.limits import MAX_DRAFT_LEN, Limits
from protocol.logprobs import MAX_TOP_LOGPROBS, TokenLogprobs
from protocol.messages import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    Close,
    Decode,
    Draft,
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
from protocol.sparse import MAX_STEPS, SparseDistribution
from protocol.zmtp import socket_bytes

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
VOCAB_SIZES = [2, 300, 49_152, 70_000, 200_000]
KINDS: tuple[type[Message], ...] = get_args(Message)
LIMITS = Limits(max_prompt_len=4, max_draft_len=3, max_uplink_k=5)
CODEC = FrameCodec(300, LIMITS)
TAGS = {
    Hello: 0,
    Welcome: 1,
    Open: 2,
    Opened: 3,
    Extend: 4,
    Draft: 5,
    Decode: 6,
    Verdict: 7,
    Close: 8,
    Fault: 9,
    Resume: 11,
    Resumed: 12,
}
PIPELINED_DRAFT_TAG, GIVEN_DRAFT_TAG = 10, 13
SAMPLING = Sampling(0.5, 3, 0.9, 7)


@st.composite
def drafts_with_distributions(draw: st.DrawFn, vocab_size: int) -> Draft:
    token_ids, distributions = [], []
    steps = draw(st.sampled_from([1, 10, 768, MAX_STEPS]))
    for _ in range(draw(st.integers(1, 3))):
        support = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=8, unique=True))
        parts = draw(st.lists(st.integers(1, 999), min_size=len(support), max_size=len(support)))
        distributions.append(SparseDistribution.quantize(vocab_size, np.array(support), np.array(parts) / 999, steps))
        token_ids.append(draw(st.sampled_from(distributions[-1].support.tolist())))
    assumed_bonus = draw(st.none() | st.integers(0, vocab_size - 1))
    return Draft(draw(counters), draw(counters), tuple(token_ids), tuple(distributions), assumed_bonus)


counters = st.integers(0, 2**32 - 1)
printable = st.characters(codec="utf-8", exclude_categories=["C", "Z"], include_characters=" ")
biases = st.floats(-100, 100, width=32)
samplings = (
    st.builds(
        Sampling,
        temperature=st.just(0.0) | st.floats(MIN_TEMPERATURE, MAX_TEMPERATURE),
        top_k=st.integers(0, 2**31 - 1),
        top_p=st.floats(0, 1, exclude_min=True),
        seed=st.integers(0, 2**63 - 1),
    )
    | st.builds(
        Sampling,
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0.01, 100),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        logit_bias=st.dictionaries(st.integers(0, 1), biases).map(lambda one: tuple(one.items())),
        min_tokens=st.integers(0, 2**31 - 1),
        ignore_eos=st.booleans(),
        stop_token_ids=st.lists(st.integers(0, 1), max_size=64).map(tuple),
    )
    | st.builds(Sampling, grammar=st.text(st.characters(codec="utf-8"), max_size=300), logprobs=st.integers(0, 20))
)


def token_logprobs(vocab_size: int) -> st.SearchStrategy[TokenLogprobs]:
    logprobs = st.floats(max_value=0, width=32)
    top = st.lists(st.tuples(st.integers(0, vocab_size - 1), logprobs), max_size=20).map(tuple)
    return st.builds(TokenLogprobs, logprobs, top)


def field_strategies(vocab_size: int) -> dict[str, st.SearchStrategy[Any]]:
    """Strategies by field name; all other fields are counters."""
    token_ids = st.lists(st.integers(0, vocab_size - 1), max_size=64).map(tuple)
    return {
        "vocabulary_hash": st.binary(min_size=32, max_size=32),
        "committed_hash": st.binary(min_size=8, max_size=8),
        "encodings": st.lists(st.sampled_from(Encoding), max_size=2).map(tuple),
        "assumed_bonus": st.none() | st.integers(0, vocab_size - 1),
        "stop_ids": st.lists(counters, max_size=20).map(tuple),
        "model": st.text(printable, max_size=200),
        "modes": st.lists(st.sampled_from(Mode), max_size=6).map(tuple),
        "mode": st.sampled_from(Mode),
        "pass_seconds": st.floats(0, 2**32 - 1),
        "row_seconds": st.floats(0, 2**32 - 1),
        "sampling": samplings,
        "prompt_ids": token_ids,
        "token_ids": token_ids,
        "distributions": st.just(()),
        "accepted": st.integers(0, 64),
        "given": st.just(False),
        "block_verification": st.booleans(),
        "logprobs": st.lists(token_logprobs(vocab_size), max_size=65).map(tuple),
        "token_id": st.integers(0, vocab_size - 1),
        "code": st.text(printable, max_size=40),
        "text": st.text(printable, max_size=1000),
    }


def messages(kind: type[Message], vocab_size: int) -> st.SearchStrategy[Message]:
    known = field_strategies(vocab_size)
    plain: st.SearchStrategy[Message] = st.builds(
        kind, **{entry.name: known.get(entry.name, counters) for entry in fields(kind)}
    )
    if kind is Draft:
        given = st.builds(Draft, counters, counters, known["token_ids"].filter(bool), given=st.just(True))
        return plain | drafts_with_distributions(vocab_size) | given
    if kind is Extend:
        return plain | st.builds(Extend, counters, counters, counters, known["token_ids"])
    if kind is Fault:
        return plain | st.builds(Fault, st.none(), known["code"], known["text"])
    return plain


def frame_of(*values: object) -> bytes:
    frame: bytes = msgpack.packb(list(values))
    return frame


def refused(frame: bytes, match: str, error: type[ProtocolError] = FrameError) -> None:
    with pytest.raises(error, match=match):
        CODEC.decode(frame)


def ids_of(*ids: int, width: int = 9) -> bytes:
    """Pack ids as one bit string, the lowest bit of each first."""
    bits = "".join(f"{token_id:0{width}b}"[::-1] for token_id in ids)
    return bytes(int(bits[start : start + 8].ljust(8, "0"), 2) for start in range(0, len(bits), 8))


@pytest.mark.parametrize("text", ["full\r\n2026-01-01 ERROR forged", "\x1b[2Jfull", "\u2028full", "a\u202efull"])
def test_texts_of_a_peer_cannot_forge_lines_or_control_a_terminal(text: str) -> None:
    for message in (Fault(None, "full", text, 1), Fault(None, text, "full", 1), Welcome(3, text, 8, 8, (Mode.IDS,))):
        received = CODEC.decode(CODEC.encode(message))
        texts = [value for value in astuple(received) if isinstance(value, str)]
        assert all(one.isprintable() for one in texts)
        assert any("full" in one for one in texts)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_message_round_trips(kind: type[Message], vocab_size: int) -> None:
    codec = FrameCodec(vocab_size)

    @given(messages(kind, vocab_size))
    @settings(relaxed, max_examples=40)
    def round_trips(message: Message) -> None:
        frame = codec.encode(message)
        assert codec.decode(frame) == message
        assert type(codec.decode(frame)) is kind
        assert len(frame) <= codec.max_frame_bytes

    round_trips()


def test_every_message_has_its_tag() -> None:
    assert set(TAGS) == set(KINDS)
    samples: list[Message] = [Opened(0, 1), Decode(0, 1, 2), Verdict(0, 1, 0, 2), Close(4), Fault(None, "link", "gone")]
    samples += [Resume.of(0, 1, (1, 2)), Resumed(0, 1, 2), Draft(0, 1, (), assumed_bonus=3)]
    assert [msgpack.unpackb(CODEC.encode(message))[0] for message in samples] == [3, 6, 7, 8, 9, 11, 12, 10]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_ids_take_as_many_bits_as_the_vocabulary_needs(vocab_size: int) -> None:
    codec, last = FrameCodec(vocab_size), vocab_size - 1
    for ids in ((0, last), (last,) * 7, tuple(range(2)) * 32):
        frame = codec.encode(Draft(0, 1, ids))
        assert frame.endswith(ids_of(*ids, width=max(8, last.bit_length())))
        assert codec.decode(frame) == Draft(0, 1, ids)


@pytest.mark.parametrize("vocab_size", [2, 300, 70_000])
def test_full_distributions_round_trip(vocab_size: int) -> None:
    probs = np.random.default_rng(1).dirichlet(np.ones(vocab_size))
    full = FullDistribution.quantize(probs)
    draft = Draft(0, 1, (int(probs.argmax()),) * 2, (full, full))
    assert FrameCodec(vocab_size).decode(FrameCodec(vocab_size).encode(draft)) == draft


def test_the_largest_valid_frames_are_within_the_bound() -> None:
    for vocab_size in (2, 6, 15, 16, 300):
        codec = FrameCodec(vocab_size)
        uniform, fields_and_ids = np.full(vocab_size, 1 / vocab_size), (2**32 - 1, 2**32 - 1, (1,) * 64)
        for one in (
            FullDistribution.quantize(uniform),
            SparseDistribution.quantize(vocab_size, np.arange(vocab_size), uniform, MAX_STEPS),
        ):
            assert len(codec.encode(Draft(*fields_and_ids, (one,) * 64))) <= codec.max_frame_bytes
    codec = FrameCodec(300)
    assert len(codec.encode(Open(0, 0, Mode.IDS, Sampling(), (299,) * 131_072))) <= codec.max_frame_bytes


@pytest.mark.parametrize("draft_len", [1, 64, MAX_DRAFT_LEN])
def test_the_longest_replies_are_within_the_bound(draft_len: int) -> None:
    limits, last = Limits(max_draft_len=draft_len), 2**32 - 1
    told = TokenLogprobs(-1.0, ((VOCAB_SIZES[-1] - 1, -1.0),) * MAX_TOP_LOGPROBS)
    replies: list[Message] = [
        Verdict(last, last, draft_len, 1, (told,) * (draft_len + 1)),
        Fault(last, "internal" * 5, "😀" * MAX_FAULT_TEXT, last),
        Welcome(last, "😀" * 200, last, last, tuple(Mode), stop_ids=tuple(range(MAX_DRAFT_LEN + 1))),
    ]
    codec = FrameCodec(VOCAB_SIZES[-1], limits)
    assert all(len(codec.encode(reply)) <= max_reply_bytes(limits) for reply in replies)


@given(st.binary(max_size=120))
@settings(relaxed, max_examples=1500)
def test_random_bytes_decode_or_raise_frame_error(frame: bytes) -> None:
    decodes_or_raises_frame_error(CODEC, frame)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.binary(max_size=9)
        | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=6),
        max_leaves=12,
    ),
    st.integers(0, 12),
)
@settings(relaxed, max_examples=500)
def test_random_msgpack_values_decode_or_raise_frame_error(values: object, tag: int) -> None:
    decodes_or_raises_frame_error(CODEC, msgpack.packb(values))
    decodes_or_raises_frame_error(CODEC, frame_of(tag, *(values if isinstance(values, list) else [values])))


def decodes_or_raises_frame_error(codec: FrameCodec, frame: bytes) -> bool:
    try:
        message = codec.decode(frame)
    except (FrameError, LimitError):
        return False
    assert codec.decode(codec.encode(message)) == message
    return True


def test_damaged_frames_decode_or_raise_frame_error() -> None:
    codec, rng = FrameCodec(300), np.random.default_rng(0)
    pair = SparseDistribution.quantize(300, np.array([7, 200]), np.array([0.25, 0.75]), 12)
    full = FullDistribution.quantize(np.full(300, 1 / 300))
    valid: list[Message] = [
        Hello(1, 300, bytes(range(32)), (2, 7)),
        Welcome(1, "table", 4096, 64, tuple(Mode)),
        Open(0, 0, Mode.TOPK, SAMPLING, (1, 2, 299)),
        Extend(3, 300, 70_000, (1, 2)),
        Extend(3, 300, 70_000, (1, 2), SAMPLING),
        Draft(0, 9, (7, 200), (pair, pair)),
        Draft(0, 9, (7,), (full,)),
        Draft(0, 9, (7, 7, 1)),
        Draft(0, 9, (7, 1), assumed_bonus=5),
        Resume.of(3, 70, (1, 2, 3)),
        Verdict(0, 9, 3, 299),
        Decode(1, 2, 3),
        Fault(None, "state", "no"),
    ]
    frames = [codec.encode(message) for message in valid]
    refusals = 0
    for _ in range(6000):
        frame = bytearray(frames[rng.integers(len(frames))])
        for _ in range(rng.integers(1, 4)):
            index = int(rng.integers(len(frame)))
            change = rng.integers(4)
            if change == 0:
                frame[index] ^= 1 << int(rng.integers(8))
            elif change == 1:
                frame[index] = int(rng.integers(256))
            elif change == 2:
                frame.insert(index, int(rng.integers(256)))
            elif len(frame) > 1:
                del frame[index:]
            if not frame:
                break
        refusals += not decodes_or_raises_frame_error(codec, bytes(frame) or b"\x00")
    assert 1000 < refusals < 6000  # some damage makes another valid message


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x92\x08",
        frame_of(8, 0) + b"\x00",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 5000 + b"\x00",
        msgpack.packb({}),
        msgpack.packb({8: 0}),
        msgpack.packb(8),
        msgpack.packb([]),
        msgpack.packb(None),
        msgpack.packb(["Close", 0]),
        msgpack.packb([True, 0, 1]),
        msgpack.packb([8.0, 0]),
        msgpack.packb([[8, 0]]),
        msgpack.packb([9, None, "a", msgpack.Timestamp(1, 1)]),
        msgpack.packb([8, msgpack.ExtType(5, b"x")]),
        b"\x94\x09\xc0\xa1a\xa1\xff",
        b"\x92\x08\xc7\x0c\xff" + b"\xff" * 12,
    ],
    ids=lambda frame: frame[:8].hex() or "empty",
)
def test_bytes_that_are_not_a_message_are_refused(frame: bytes) -> None:
    refused(frame, ".")


def test_an_unknown_tag_is_refused() -> None:
    known = ", ".join(map(str, sorted([*TAGS.values(), PIPELINED_DRAFT_TAG, GIVEN_DRAFT_TAG])))
    for tag in (14, 255, -1, 2**63):
        refused(frame_of(tag, 0), rf"the tag {tag}; allowed: \[{known}\]")


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_fields_are_refused(kind: type[Message]) -> None:
    if kind is Draft:
        for tag, due in ((TAGS[Draft], 2), (PIPELINED_DRAFT_TAG, 3)):
            refused(frame_of(tag, *[0] * (due - 1)), f"Draft has {due - 1} fields; allowed: {due} or more")
        return
    due = sum(entry.default is MISSING for entry in fields(kind))
    for count in {0, due - 1}:
        refused(frame_of(TAGS[kind], *[0] * count), f"{kind.__name__} has {count} fields; allowed: {due} or more")


def test_every_mode_round_trips() -> None:
    for mode in Mode:
        opening = Open(1, 0, mode, Sampling(0.7, 40, 0.95, 2**63 - 1), (1, 2))
        assert CODEC.decode(CODEC.encode(opening)) == opening


def test_rounds_take_few_bytes_at_the_socket() -> None:
    codec = FrameCodec(49_152)
    for round_id in (1, 300):
        for count in (1, 4, 8, 16):
            draft = codec.encode(Draft(0, round_id, tuple(range(49_152 - count, 49_152))))
            assert socket_bytes(draft) <= 2.2 * count + 12
        assert socket_bytes(codec.encode(Draft(0, round_id, ()))) <= 8
        assert socket_bytes(codec.encode(Verdict(0, round_id, 8, 49_151))) <= 12


@pytest.mark.parametrize("inner", [[], {}])
def test_arrays_inside_each_other_are_refused_before_they_are_built(inner: object) -> None:
    """Each level may have 256 entries: without a limit a frame of 9 MB takes seconds and 600 MB."""
    frame = msgpack.packb([5, [[[inner] * 256] * 256] * 8])
    tracemalloc.start()
    with pytest.raises(FrameError, match="not a msgpack array"):
        FrameCodec(12).decode(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(frame) + 2**20


def test_a_verdict_has_the_log_probabilities_of_the_longest_draft() -> None:
    told = tuple(TokenLogprobs(-1.0) for _ in range(MAX_DRAFT_LEN + 1))
    verdict = Verdict(0, 1, MAX_DRAFT_LEN, 2, told)
    codec = FrameCodec(12, Limits(max_draft_len=MAX_DRAFT_LEN))
    assert codec.decode(codec.encode(verdict)) == verdict
    with pytest.raises(SettingsError, match="--max-draft-len is 256; allowed: 1 or more, up to 255"):
        Limits(max_draft_len=MAX_DRAFT_LEN + 1)
