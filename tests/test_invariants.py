"""The invariants of the design, between a device and a base station joined in memory.

The models are tables, so an answer is a list of tokens that a loop can predict.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import pytest

from basestation.target_model import TargetModel
from device.client import Client, Timeouts
from device.draft_model import DraftModel
from device.link import Link
from device.session import DeviceSession, DraftSettings, Origin
from protocol.errors import ContextLengthError, FaultError, SettingsError
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import (
    OLDEST_VERSION,
    PROTOCOL_VERSION,
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
from protocol.zmtp import socket_bytes
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table, target_alone
from tests.link_pair import Fate, MemoryTransport, Station, join, once
from tests.raw_device import RawDevice, hello

VOCAB = 12
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.7)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
COUNT = 40
GREEDY, SAMPLED = Sampling(), Sampling(0.9, seed=7)
CODEC = FrameCodec(VOCAB)
SETTINGS = [
    *(DraftSettings(mode, GREEDY, 4, 4) for mode in (Mode.IDS, Mode.TOPK, Mode.TOPP, Mode.FULL, Mode.TARGET)),
    DraftSettings(Mode.TOPK, SAMPLED, 4, 4, uplink_steps=5),
    DraftSettings(Mode.TOPP, SAMPLED, VOCAB, 4, uplink_p=0.8),
    *(DraftSettings(mode, SAMPLED, 4, 4) for mode in (Mode.TOPK, Mode.FULL, Mode.TARGET)),
]
SAMPLED_SETTINGS = SETTINGS[-5:-1]


def settings_name(settings: DraftSettings) -> str:
    coarse = "-coarse" if settings.uplink_steps else ""
    return f"{settings.mode}-{'greedy' if settings.sampling.greedy else 'sampled'}{coarse}"


every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=settings_name)


def draft_model(stop_ids: tuple[int, ...] = (), context_length: int = 4096) -> DraftModel:
    return FakeDraftModel.make(DRAFT, stop_ids, context_length)


def new_station(stop_ids: tuple[int, ...] = (), context_length: int = 4096) -> Station:
    return Station(FakeTarget.make(TARGET, frozenset(stop_ids), context_length))


def answer_of(session: DeviceSession, count: int = COUNT) -> list[int]:
    return [token.token_id for token in session.answer(count)]


def answer(
    settings: DraftSettings, up: Fate = once, down: Fate = once, prompt: Sequence[int] = PROMPT, count: int = COUNT
) -> list[int]:
    """The answer of a station and a device that are new."""
    station, model = new_station(), draft_model()
    client, _ = join(station, model, MemoryTransport(station, up=up, down=down))
    return answer_of(client.open(settings, model, list(prompt)), count)


def passes_of(model: DraftModel) -> list[int]:
    return cast(FakeDraftModel, model).passes


# -- invariant 3 (greedy; the sampled half is tests/test_basestation_verify.py) --


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("draft_len", [1, 4, 8])
@pytest.mark.parametrize("prompt", [[5], [0, 0], PROMPT, [11, 7, 3] * 9], ids=len)
def test_invariant_3_a_greedy_answer_is_the_targets_own(mode: Mode, draft_len: int, prompt: list[int]) -> None:
    settings = DraftSettings(mode, GREEDY, 4, draft_len)
    assert answer(settings, prompt=prompt) == target_alone(TARGET, prompt, COUNT)


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=settings_name)
def test_a_draft_is_sometimes_right_and_sometimes_wrong(settings: DraftSettings) -> None:
    """Without this the tests here would show little."""
    station, model = new_station(), draft_model()
    client, _ = join(station, model)
    session = client.open(settings, model, PROMPT)
    tokens = list(session.answer(COUNT))
    assert {token.origin for token in tokens} == set(Origin)
    assert 0 < session.counters.accepted < session.counters.drafted
    assert session.counters.rounds < COUNT
    assert sum(token.origin is Origin.ACCEPTED for token in tokens) == session.counters.accepted


@pytest.mark.parametrize("mode", [Mode.TOPK, Mode.FULL, Mode.TARGET])
@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 1e-308, 5e-324])
def test_invariant_3_a_tiny_temperature_is_nearly_greedy_or_refused(mode: Mode, temperature: float) -> None:
    try:
        sampling = Sampling(temperature)
    except SettingsError:
        return
    assert answer(DraftSettings(mode, sampling, 4, 4)) == target_alone(TARGET, PROMPT, COUNT)


# -- invariants 2 and 4 --


def first_copies_lost(*kinds: type[Message]) -> Fate:
    """Loses each message of these kinds the first time it is sent."""
    seen: set[Hashable] = set()

    def fate(message: Message) -> int:
        if not isinstance(message, kinds) or isinstance(message, Hello | Welcome):
            return 1
        key = type(message), getattr(message, "session_id", None), getattr(message, "round_id", None)
        if key in seen:
            return 1
        seen.add(key)
        return 0

    return fate


def twice(_: Message) -> int:
    return 2


def lossy(seed: int, rate: float = 0.3) -> Fate:
    """Loses messages at random, but for the greeting, which is not repeated, and doubles some."""
    rng = np.random.default_rng(seed)

    def fate(message: Message) -> int:
        if isinstance(message, Hello | Welcome):
            return 1
        return int(rng.choice([0, 1, 2], p=[rate, 0.9 - rate, 0.1]))

    return fate


FATES: dict[str, Callable[[], tuple[Fate, Fate]]] = {
    "first Draft or Decode lost": lambda: (first_copies_lost(Draft, Decode), once),
    "first Verdict lost": lambda: (once, first_copies_lost(Verdict)),
    "first Open lost": lambda: (first_copies_lost(Open), once),
    "first Opened lost": lambda: (once, first_copies_lost(Opened)),
    "first copy of all lost": lambda: (
        first_copies_lost(Open, Draft, Decode),
        first_copies_lost(Opened, Verdict),
    ),
    "all doubled": lambda: (twice, twice),
    "all doubled upwards, first lost downwards": lambda: (twice, first_copies_lost(Opened, Verdict)),
    "30 % lost": lambda: (lossy(1), lossy(2)),
    "30 % lost, otherwise": lambda: (lossy(3), lossy(4)),
}


@every_setting
@pytest.mark.parametrize("fates", FATES.values(), ids=FATES)
def test_invariant_4_lost_and_repeated_frames_change_nothing(
    settings: DraftSettings, fates: Callable[[], tuple[Fate, Fate]]
) -> None:
    up, down = fates()
    assert answer(settings, up, down) == answer(settings)


def test_lost_frames_are_indeed_lost() -> None:
    station, model = new_station(), draft_model()
    transport = MemoryTransport(station, up=first_copies_lost(Draft))
    client, _ = join(station, model, transport)
    session = client.open(SETTINGS[0], model, PROMPT)
    answer_of(session)
    drafts = [frame for frame in transport.uplink if isinstance(CODEC.decode(frame), Draft)]
    assert len(drafts) == 2 * session.counters.rounds
    assert drafts[::2] == drafts[1::2]
    assert transport.now == session.counters.rounds * Timeouts().repeat


def opening(sampling: Sampling = GREEDY, session_id: int = 0) -> Open:
    return Open(session_id, 0, Mode.IDS if sampling.greedy else Mode.TARGET, sampling, tuple(PROMPT))


def test_invariant_4_a_repeated_draft_gets_the_stored_verdict_and_runs_nothing() -> None:
    target = FakeTarget(TARGET)
    station = Station(cast(TargetModel, target))
    device = RawDevice(station, b"a")
    device.say(opening())
    draft = Draft(0, 1, tuple(target_alone(TARGET, PROMPT, 2)))
    verdict = device.say(draft)
    assert verdict == Verdict(0, 1, 2, target_alone(TARGET, PROMPT, 3)[2])
    passes = list(target.passes)
    assert [device.say(draft) for _ in range(3)] == [verdict] * 3
    assert target.passes == passes
    following = device.say(Draft(0, 2, ()))
    assert following == Verdict(0, 2, 0, target_alone(TARGET, PROMPT, 4)[3])
    assert device.say(Draft(0, 2, ())) == following
    answers = target_alone(TARGET, PROMPT, 10)
    for round_id in range(3, 3 + Limits.window):
        assert device.say(Draft(0, round_id, ())) == Verdict(0, round_id, 0, answers[round_id + 1])
    assert device.say(draft) is None  # long over: a device has no more than a window of Drafts under way


def test_invariant_4_a_repeated_decode_gets_all_stored_verdicts() -> None:
    target = FakeTarget(TARGET)
    station = Station(cast(TargetModel, target))
    device = RawDevice(station, b"a")
    device.say(opening(SAMPLED))
    verdicts = [device.say(Decode(0, 1, 3)), station.pull(b"a"), station.pull(b"a")]
    assert [type(verdict) for verdict in verdicts] == [Verdict] * 3
    passes = list(target.passes)
    assert [device.say(Decode(0, 1, 3)), station.pull(b"a"), station.pull(b"a"), station.pull(b"a")] == [
        *verdicts,
        None,
    ]
    assert target.passes == passes


@every_setting
def test_invariant_2_an_answer_does_not_depend_on_who_else_is_served(settings: DraftSettings) -> None:
    station = new_station()
    others = [replace(settings, sampling=replace(settings.sampling, seed=seed)) for seed in (settings.sampling.seed, 8)]
    answers: list[list[int]] = []
    streams = []
    for index, (one, prompt) in enumerate(zip([settings, *others], [PROMPT, PROMPT, [2, 2]], strict=True)):
        model = draft_model()
        client, _ = join(station, model, MemoryTransport(station, bytes([index + 1]), lossy(index), lossy(9 + index)))
        streams.append(client.open(one, model, prompt).answer(COUNT))
        answers.append([])
    for tokens in zip(*streams, strict=True):
        for stream_answer, token in zip(answers, tokens, strict=True):
            stream_answer.append(token.token_id)
    assert answers[0] == answers[1] == answer(settings)
    assert answers[2] == answer(others[1], prompt=[2, 2])


@pytest.mark.parametrize("settings", SETTINGS[-5:], ids=settings_name)
def test_invariant_2_a_sampled_answer_is_a_function_of_its_seed(settings: DraftSettings) -> None:
    other = replace(settings, sampling=replace(SAMPLED, seed=8))
    assert answer(settings) == answer(settings)
    assert answer(settings) != answer(other)
    assert answer(settings) != target_alone(TARGET, PROMPT, COUNT)


def test_two_sessions_of_one_device_do_not_disturb_each_other() -> None:
    station, models = new_station(), [draft_model(), draft_model()]
    client, _ = join(station, models[0])
    streams = [
        client.open(settings, model, PROMPT).answer(COUNT)
        for settings, model in zip((SETTINGS[0], SAMPLED_SETTINGS[0]), models, strict=True)
    ]
    pairs = [(one.token_id, other.token_id) for one, other in zip(*streams, strict=True)]
    assert [one for one, _ in pairs] == target_alone(TARGET, PROMPT, COUNT)
    assert [other for _, other in pairs] == answer(SAMPLED_SETTINGS[0])


# -- invariant 5 --


@every_setting
def test_invariant_5_the_prompt_goes_up_once_and_then_only_drafts(settings: DraftSettings) -> None:
    station, model = new_station(), draft_model()
    transport = MemoryTransport(station)
    client, _ = join(station, model, transport)
    session = client.open(settings, model, PROMPT)
    tokens = answer_of(session)
    session.close()
    greeting, first, *rounds, last = [CODEC.decode(frame) for frame in transport.uplink]
    assert isinstance(greeting, Hello)
    assert isinstance(first, Open)
    assert first.prompt_ids == tuple(PROMPT)
    assert last == Close(0)
    if settings.mode is Mode.TARGET:
        assert rounds == [Decode(0, 1, COUNT)]
        return
    assert len(rounds) == session.counters.rounds
    drafted = 0
    for message in rounds:
        assert isinstance(message, Draft)
        assert len(message.token_ids) <= (settings.draft_len or 0)
        assert len(message.distributions) == (0 if settings.mode is Mode.IDS else len(message.token_ids))
        drafted += len(message.token_ids)
    assert drafted == session.counters.drafted
    assert session.counters.accepted + session.counters.rounds == len(tokens) == COUNT


TURNS = [[7, 8], [1], [0, 11, 4, 4, 2]]


@every_setting
def test_invariant_5_a_turn_of_a_conversation_sends_and_runs_only_what_is_new(settings: DraftSettings) -> None:
    station, model = new_station(), draft_model()
    transport = MemoryTransport(station)
    client, _ = join(station, model, transport)
    session = client.open(settings, model, PROMPT)
    conversation = [*PROMPT, *answer_of(session, 10)]
    for turn in TURNS:
        prompt = [*conversation, *turn]
        sent, run = len(transport.uplink), len(passes_of(model))
        session.extend(prompt)
        (extend,) = (CODEC.decode(frame) for frame in transport.uplink[sent:])
        assert isinstance(extend, Extend)
        assert (extend.start, extend.token_ids) == (len(conversation), tuple(turn))
        if settings.mode is Mode.TARGET:
            assert passes_of(model) == []
        else:  # of what is new all but the last, and the last two of the answer, which were never run
            assert sum(passes_of(model)[run:]) <= len(turn) - 1 + 2
        conversation = [*prompt, *answer_of(session, 10)]


@every_setting
def test_a_conversation_gives_what_fresh_sessions_give(settings: DraftSettings) -> None:
    station, model = new_station(), draft_model()
    client, _ = join(station, model, MemoryTransport(station, up=lossy(5), down=lossy(6)))
    session = client.open(settings, model, PROMPT)
    conversation = [*PROMPT, *answer_of(session, 10)]
    for turn in TURNS:
        prompt = [*conversation, *turn]
        session.extend(prompt)
        tokens = answer_of(session, 10)
        assert tokens == answer(settings, prompt=prompt, count=10)
        conversation = [*prompt, *tokens]


@every_setting
def test_a_conversation_may_go_back_on_what_was_said(settings: DraftSettings) -> None:
    station, model = new_station(), draft_model()
    client, _ = join(station, model)
    session = client.open(settings, model, PROMPT)
    answer_of(session)
    for prompt in ([*PROMPT[:5], 0, 0], PROMPT[:2], [10, 11], PROMPT, PROMPT):
        session.extend(prompt)
        assert answer_of(session, 15) == answer(settings, prompt=prompt, count=15)


# -- invariant 6 --


@dataclass
class RecordingTransport(MemoryTransport):
    downlink: list[bytes] = field(default_factory=list)

    def receive(self, timeout: float) -> bytes | None:
        frame = super().receive(timeout)
        if frame is not None:
            self.downlink.append(frame)
        return frame


@every_setting
@pytest.mark.parametrize("repeat", [False, True], ids=["clean", "lossy"])
def test_invariant_6_every_byte_is_counted(settings: DraftSettings, repeat: bool) -> None:
    station, model = new_station(), draft_model()
    transport = RecordingTransport(station, up=lossy(1), down=lossy(2)) if repeat else RecordingTransport(station)
    client, link = join(station, model, transport)
    session = client.open(settings, model, PROMPT)
    answer_of(session)
    session.close()
    assert link.uplink_bytes == sum(map(socket_bytes, transport.uplink))
    assert link.downlink_bytes == sum(map(socket_bytes, transport.downlink))
    assert link.uplink_bytes > sum(map(len, transport.uplink)) > 0


def test_a_frame_takes_its_flags_and_length_in_the_stream() -> None:
    assert [socket_bytes(bytes(count)) for count in (0, 1, 255, 256, 1000)] == [2, 3, 257, 265, 1009]


# -- invariant 7 --


BAD = {
    "bytes that are no message": (b"\xc1\x00rubbish", None, "frame"),
    "a damaged message": (CODEC.encode(Draft(0, 1, (1, 2)))[:-1], None, "frame"),
    "an unknown token": (FrameCodec(VOCAB + 1).encode(Draft(0, 1, (VOCAB,))), None, "frame"),
    "a session that is not open": (CODEC.encode(Draft(5, 1, (1,))), 5, "unknown_session"),
    "a round too far": (CODEC.encode(Draft(0, 1 + Limits.window, (1,))), 0, "state"),
    "a second Open": (CODEC.encode(replace(opening(), round_id=1)), 0, "state"),
    "an Extend beyond the end": (CODEC.encode(Extend(0, 1, 20, (1,))), 0, "state"),
    "no Extend at all": (CODEC.encode(Extend(0, 1, 2, ())), 0, "state"),
    "a Decode of nothing": (CODEC.encode(Decode(0, 1, 0)), 0, "state"),
    "a Decode beyond the context": (CODEC.encode(Decode(0, 1, 2**32 - 1)), 0, "state"),
    "a Draft beyond the context": (CODEC.encode(Draft(0, 1, (1,) * 62)), 0, "state"),
    "a prompt beyond the context": (
        CODEC.encode(replace(opening(session_id=1), prompt_ids=(1,) * 64)),
        1,
        "context_length",
    ),
    "a turn beyond the context": (CODEC.encode(Extend(0, 1, 8, (1,) * 56)), 0, "context_length"),
    "a message for devices": (CODEC.encode(Verdict(0, 1, 0, 1)), 0, "state"),
    "a greeting for devices": (CODEC.encode(Welcome(1, "x", 1, 1, ())), None, "state"),
}


@pytest.mark.parametrize(("frame", "session_id", "code"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("settings", [SETTINGS[0], SAMPLED_SETTINGS[0]], ids=settings_name)
def test_invariant_7_bad_input_ends_one_session_at_worst(
    settings: DraftSettings, frame: bytes, session_id: int | None, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    station, model = new_station(context_length=64), draft_model()
    client, _ = join(station, model)
    stream = client.open(settings, model, PROMPT).answer(COUNT)
    tokens = [next(stream).token_id]
    bad = RawDevice(station, b"b")
    assert bad.say(opening()) == Opened(0, 0)
    bystander = RawDevice(station, b"c")
    assert bystander.say(opening()) == Opened(0, 0)
    with caplog.at_level(logging.WARNING, "basestation.engine"):
        fault = bad.send(frame)
    assert isinstance(fault, Fault)
    assert (fault.session_id, fault.code) == (session_id, code)
    assert fault.text
    assert len(caplog.records) == 1
    assert fault.text in caplog.text
    tokens += [token.token_id for token in stream]
    assert tokens == answer(settings)
    expected = Verdict(0, 1, 0, target_alone(TARGET, PROMPT, 1)[0])
    assert bystander.say(Draft(0, 1, ())) == expected
    reply = bad.say(Draft(0, 1, ()))
    if session_id == 0:
        assert isinstance(reply, Fault)
        assert (reply.session_id, reply.code) == (0, "unknown_session")
        assert bad.say(opening()) == Opened(0, 0)
        assert bad.say(Draft(0, 1, ())) == expected
    else:
        assert reply == expected


def test_invariant_7_rubbish_between_all_frames_changes_no_other_answer() -> None:
    station, model = new_station(), draft_model()
    client, _ = join(station, model)
    rng, tokens = np.random.default_rng(0), []
    for token in client.open(SAMPLED_SETTINGS[0], model, PROMPT).answer(COUNT):
        tokens.append(token.token_id)
        for _ in range(20):
            station.push(b"b", rng.bytes(int(rng.integers(0, 40))))
    assert tokens == answer(SAMPLED_SETTINGS[0])
    assert all(isinstance(message, Fault) for message in station.outboxes[b"b"])


def test_invariant_7_the_fault_of_one_session_does_not_end_another_of_the_same_device() -> None:
    station, models = new_station(), [draft_model(), draft_model()]
    client, _ = join(station, models[0], MemoryTransport(station, down=lambda message: 1 + isinstance(message, Fault)))
    lost, kept = (client.open(SETTINGS[0], model, PROMPT) for model in models)
    station.push(b"a", CODEC.encode(Draft(0, 9, ())))
    with pytest.raises(FaultError, match="round 9 where 1 comes next"):
        answer_of(lost)
    assert answer_of(kept) == target_alone(TARGET, PROMPT, COUNT)


def test_a_fault_reaches_the_user_with_its_code() -> None:
    station, model = new_station(), draft_model()
    client, _ = join(station, model)
    session = client.open(SETTINGS[0], model, PROMPT)
    station.push(b"a", CODEC.encode(Draft(0, 9, ())))
    with pytest.raises(FaultError, match="round 9 where 1 comes next") as caught:
        answer_of(session)
    assert caught.value.fault_code == "state"


# -- invariant 8 --


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vocabulary_hash": "ab" * 32}, "tokens are not the target's"),
        ({"vocab_size": VOCAB + 1}, f"a draft model of {VOCAB + 1} tokens; the target has {VOCAB}"),
        ({"stop_ids": (3,)}, r"stops at the tokens \[3\]; the target stops at \[2\]"),
        ({"stop_ids": ()}, r"stops at the tokens \[\]; the target stops at \[2\]"),
    ],
)
def test_invariant_8_another_vocabulary_is_refused_at_hello(change: dict[str, object], match: str) -> None:
    station = new_station(stop_ids=(2,))
    manifest = draft_model(stop_ids=(2,)).manifest
    link = Link(MemoryTransport(station), FrameCodec(VOCAB), "memory")
    assert Client(link, manifest).welcome.model == "table"
    with pytest.raises(FaultError, match=match) as caught:
        Client(link, replace(manifest, **change))  # type: ignore[arg-type]
    assert caught.value.fault_code == "mismatch"


def test_invariant_8_a_version_that_is_too_old_is_refused_at_hello() -> None:
    device = RawDevice(new_station(), b"a", greet=False)
    fault = device.say(replace(hello(VOCAB), version=OLDEST_VERSION - 1))
    assert isinstance(fault, Fault)
    assert fault.code == "mismatch"
    assert (
        f"version {OLDEST_VERSION - 1}; this base station speaks {OLDEST_VERSION} to {PROTOCOL_VERSION}" in fault.text
    )


@pytest.mark.parametrize(
    "refused_hello", [None, replace(hello(VOCAB), vocabulary_hash=bytes(32))], ids=["none", "refused"]
)
@pytest.mark.parametrize("request_", [opening(), Draft(0, 1, ()), Decode(0, 1, 1), Extend(0, 1, 0, (1,))], ids=repr)
def test_invariant_8_requests_before_hello_are_refused(request_: Message, refused_hello: Hello | None) -> None:
    station = new_station()
    RawDevice(station, b"b")  # another one's greeting does not count
    device = RawDevice(station, b"a", greet=False)
    if refused_hello is not None:
        device.say(refused_hello)
    fault = device.say(request_)
    assert isinstance(fault, Fault)
    assert (fault.code, fault.text) == ("unknown_session", f"{type(request_).__name__} before Hello")


# -- how answers end --


@every_setting
def test_a_stop_id_ends_the_answer_as_its_last_token(settings: DraftSettings) -> None:
    whole = answer(settings)
    for stop in dict.fromkeys(whole):
        station, model = new_station((stop,)), draft_model((stop,))
        client, _ = join(station, model, MemoryTransport(station, up=lossy(1), down=lossy(2)))
        session = client.open(settings, model, PROMPT)
        tokens = answer_of(session)
        assert tokens[-1] == stop
        assert stop not in tokens[:-1]
        assert tokens == whole[: len(tokens)]


@every_setting
def test_a_conversation_goes_on_after_a_stop_id(settings: DraftSettings) -> None:
    stop = answer(settings)[5]
    station, model = new_station((stop,)), draft_model((stop,))
    client, _ = join(station, model)
    session = client.open(settings, model, PROMPT)
    conversation = [*PROMPT, *answer_of(session)]
    session.extend([*conversation, 7, 8])
    fresh_station, fresh_model = new_station((stop,)), draft_model((stop,))
    fresh_client, _ = join(fresh_station, fresh_model)
    fresh = fresh_client.open(settings, fresh_model, [*conversation, 7, 8])
    assert answer_of(session) == answer_of(fresh)


@every_setting
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 17])
def test_an_answer_is_as_long_as_asked(settings: DraftSettings, count: int) -> None:
    tokens = answer(settings, count=count)
    assert len(tokens) == count
    if settings.sampling.greedy or settings.mode is Mode.TARGET:
        assert tokens == answer(settings)[:count]


@every_setting
@pytest.mark.parametrize(("draft_context", "target_context"), [(4096, 20), (20, 4096), (20, 20)])
def test_an_answer_ends_with_the_context(settings: DraftSettings, draft_context: int, target_context: int) -> None:
    station, model = new_station(context_length=target_context), draft_model(context_length=draft_context)
    client, _ = join(station, model)
    session = client.open(settings, model, PROMPT)
    assert len(answer_of(session)) == 20 - len(PROMPT)
    assert answer_of(session) == []
    session.extend(session.tokens[:19])
    assert len(answer_of(session)) == 1


@pytest.mark.parametrize(("draft_context", "target_context"), [(4096, 8), (8, 4096)])
def test_a_prompt_that_fills_the_context_is_refused(draft_context: int, target_context: int) -> None:
    station, model = new_station(context_length=target_context), draft_model(context_length=draft_context)
    client, _ = join(station, model)
    with pytest.raises(ContextLengthError, match=r"8 tokens.*at most 7"):
        client.open(SETTINGS[0], model, PROMPT)
    session = client.open(SETTINGS[0], model, PROMPT[:7])
    assert len(answer_of(session)) == 1
    with pytest.raises(ContextLengthError, match=r"8 tokens.*at most 7"):
        session.extend(PROMPT)


def test_a_draft_longer_than_the_station_takes_is_refused() -> None:
    station, model = new_station(), draft_model()
    client, _ = join(station, model)
    with pytest.raises(SettingsError, match="draft-len is 65; allowed: 1 to 64"):
        client.open(replace(SETTINGS[0], draft_len=65), model, PROMPT)


def test_a_silent_session_is_forgotten_and_no_other() -> None:
    station, models = new_station(), [draft_model(), draft_model()]
    clients = [
        join(station, model, MemoryTransport(station, peer))[0]
        for model, peer in zip(models, (b"a", b"b"), strict=True)
    ]
    silent, speaking = (client.open(SETTINGS[0], model, PROMPT) for client, model in zip(clients, models, strict=True))
    forgotten = Fault(0, "unknown_session", "session 0 is not open")
    tokens = []
    for now in (599.0, 600.0):
        station.now = now
        tokens += answer_of(speaking, 5)
        station.engine.drop_idle()
    assert answer_of(silent, 1) == target_alone(TARGET, PROMPT, 1)  # 600 s are not more than 600 s
    station.now = 1200.5
    station.engine.drop_idle()
    assert tokens == target_alone(TARGET, PROMPT, 10)
    for peer in (b"a", b"b"):
        station.push(peer, CODEC.encode(Draft(0, 99, ())))
        assert station.pull(peer) == forgotten
