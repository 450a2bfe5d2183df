"""Where the link is known, a device does not wait for the reply to an Open or Extend; the answers do not change."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from device.planning.planners import Planners
from device.session.session import DeviceSession
from device.settings import DraftSettings
from protocol.errors import ContextLengthError, FaultError
from protocol.limits import Limits
from protocol.messages import Decode, Draft, Extend, Fault, Hello, Message, Mode, Open, Opened, Sampling
from tests.fakes import TARGET, FakeTarget, random_table
from tests.invariants import (
    PROMPT,
    SETTINGS,
    TURNS,
    draft_model,
    first_copies_lost,
    lossy,
    new_station,
    settings_name,
    token_ids_of,
)
from tests.invariants import answer as answer_alone
from tests.link_pair import MemoryTransport, RefusingTransport, Station, join, open_session
from tests.timed_pair import PairTimes, TimedPair

SLOW_LINK = PairTimes(draft=0.008, forward=0.035, row=0.001, round_trip=0.1)
TABLE = random_table(64, seed=1, sharpness=3.0)
GREEDY = DraftSettings(Mode.IDS, Sampling(), 4, 4)
COUNT = 12

every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=settings_name)


class Device:
    """Answers over one transport with one set of planners, which knows the link after the first answer."""

    def __init__(self, transport: MemoryTransport) -> None:
        self.transport, self._model = transport, draft_model()
        self.client, _ = join(transport.station, self._model, transport)
        self._planners = Planners(self._model.manifest.quality)

    def session(self, settings: DraftSettings, prompt: list[int]) -> DeviceSession:
        return open_session(self.client, settings, self._model, prompt, self._planners)

    def answer(self, settings: DraftSettings, prompt: list[int]) -> list[int]:
        session = self.session(settings, prompt)
        tokens = token_ids_of(session, COUNT)
        session.close()
        return tokens


def sent_by(transport: MemoryTransport, start: int) -> list[Message]:
    return [transport.station.codec.decode(frame) for frame in transport.uplink[start:]]


@pytest.mark.parametrize("settings", [GREEDY, replace(GREEDY, mode=Mode.TARGET)], ids=settings_name)
def test_later_answers_and_turns_begin_a_round_trip_earlier(settings: DraftSettings) -> None:
    pair = TimedPair(TABLE, TABLE, SLOW_LINK)

    def first_token_seconds(begin: Callable[[], DeviceSession]) -> tuple[float, DeviceSession]:
        began = pair.now
        session = begin()
        answer = session.answer(COUNT)
        next(answer)
        seconds = pair.now - began
        list(answer)
        return seconds, session

    first, _ = first_token_seconds(lambda: pair.session(settings, PROMPT))
    later, session = first_token_seconds(lambda: pair.session(settings, PROMPT[::-1]))

    def turn() -> DeviceSession:
        session.extend([*session.tokens, *PROMPT])
        return session

    for seconds in (later, first_token_seconds(turn)[0]):
        assert seconds == pytest.approx(first - SLOW_LINK.round_trip, abs=0.02)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_a_lost_extend_is_noticed_whatever_the_window(window: int, seed: int) -> None:
    device = Device(MemoryTransport(Station(FakeTarget.make(TARGET), Limits(window=window))))
    ahead = replace(GREEDY, drafts_ahead=None)
    session, noticed = device.session(ahead, PROMPT), 0
    token_ids_of(session, COUNT)
    device.transport.up = lossy(seed, 0.4)
    for turn in TURNS * 3:
        prompt, start = [*session.tokens, *turn], len(device.transport.uplink)
        session.extend(prompt)
        assert token_ids_of(session, COUNT) == answer_alone(GREEDY, prompt=prompt, count=COUNT)
        noticed += any(isinstance(message, Open) for message in sent_by(device.transport, start))
    assert noticed


@pytest.mark.parametrize("round_trip", [0.02, 0.4])
def test_an_opened_that_is_not_waited_for_tells_of_another_link(round_trip: float) -> None:
    pair, settings = TimedPair(TABLE, TABLE, SLOW_LINK), replace(GREEDY, mode=Mode.TARGET)
    list(pair.session(settings, PROMPT).answer(COUNT))
    planner = pair.planners.for_settings(settings, pair.client.welcome)
    before, pair.times = planner.times.round_trip_seconds, replace(SLOW_LINK, round_trip=round_trip)
    for turn in TURNS * 3:
        list(pair.session(settings, [*PROMPT, *turn]).answer(COUNT))
    assert abs(planner.times.round_trip_seconds - round_trip) < 0.5 * abs(before - round_trip)


@every_setting
@pytest.mark.parametrize("seed", range(4))
def test_losses_and_repetitions_change_no_answer(settings: DraftSettings, seed: int) -> None:
    device = Device(MemoryTransport(new_station()))
    prompts = [[*PROMPT, *turn] for turn in TURNS]
    device.answer(settings, prompts[0])
    device.transport.up, device.transport.down = lossy(seed), lossy(seed + 100)
    for prompt in prompts:
        session = device.session(settings, prompt)
        assert token_ids_of(session, COUNT) == answer_alone(settings, prompt=prompt, count=COUNT)
        following = [*session.tokens, *TURNS[0]]
        session.extend(following)
        assert token_ids_of(session, COUNT) == answer_alone(settings, prompt=following, count=COUNT)


@every_setting
def test_a_lost_opened_is_not_waited_for(settings: DraftSettings) -> None:
    device = Device(MemoryTransport(new_station()))
    device.answer(settings, PROMPT)
    device.transport.down = lambda message: not isinstance(message, Opened)
    assert device.answer(settings, PROMPT[::-1]) == answer_alone(settings, prompt=PROMPT[::-1], count=COUNT)
    assert device.transport.now == 0


@every_setting
def test_a_base_station_that_is_full_is_asked_again(settings: DraftSettings) -> None:
    transport = RefusingTransport(new_station())
    device = Device(transport)
    device.answer(settings, PROMPT)
    transport.opens_at = transport.now + 5
    assert device.answer(settings, PROMPT[::-1]) == answer_alone(settings, prompt=PROMPT[::-1], count=COUNT)
    assert transport.refused_at


def test_a_refusal_that_no_retry_helps_ends_that_answer_alone() -> None:
    transport = RefusingTransport(new_station())
    device = Device(transport)
    device.answer(GREEDY, PROMPT)
    transport.opens_at, transport.code = transport.now + 1, "context_length"
    with pytest.raises(FaultError, match="no room"):
        device.answer(GREEDY, PROMPT[::-1])
    transport.opens_at = 0.0
    assert device.answer(GREEDY, PROMPT) == answer_alone(GREEDY, count=COUNT)


@pytest.mark.parametrize("settings", [GREEDY, replace(GREEDY, mode=Mode.TARGET)], ids=settings_name)
def test_a_new_connection_is_sent_the_open_again_and_no_resume(settings: DraftSettings) -> None:
    device = Device(MemoryTransport(new_station()))
    device.answer(settings, PROMPT)
    transport, start = device.transport, len(device.transport.uplink)

    def drop_and_reconnect(message: Message) -> int:
        if isinstance(message, Draft | Decode):
            transport.connections += transport.connections == 1
            return transport.connections > 1 and transport.uplink.count(transport.uplink[-1]) > 1
        return not isinstance(message, Open) or transport.connections > 1

    transport.up = drop_and_reconnect
    assert device.answer(settings, PROMPT[::-1]) == answer_alone(settings, prompt=PROMPT[::-1], count=COUNT)
    kinds = [type(message) for message in sent_by(transport, start)]
    request = Decode if settings.mode is Mode.TARGET else Draft
    assert kinds[:4] == [Open, request, Open, request]


def test_a_turn_whose_session_is_gone_is_opened_anew() -> None:
    device = Device(MemoryTransport(new_station()))
    session = device.session(GREEDY, PROMPT)
    token_ids_of(session, COUNT)
    device.transport.station, start = new_station(), len(device.transport.uplink)
    prompt = [*session.tokens, *TURNS[0]]
    session.extend(prompt)
    assert token_ids_of(session, COUNT) == answer_alone(GREEDY, prompt=prompt, count=COUNT)
    assert [type(one) for one in sent_by(device.transport, start)][:2] == [Extend, Draft]


class Version1Transport(MemoryTransport):
    """A base station that refuses other versions than the first, which does not tell its window."""

    def send(self, frame: bytes) -> None:
        message = self.station.codec.decode(frame)
        if isinstance(message, Hello) and message.version != 1:
            self.station.outboxes[self.peer].append(Fault(None, "mismatch", "this base station speaks 1"))
            return
        super().send(frame)


@pytest.mark.parametrize("seed", range(8))
def test_a_base_station_of_version_1_loses_no_extend(seed: int) -> None:
    device = Device(Version1Transport(new_station()))
    session = device.session(GREEDY, PROMPT)
    token_ids_of(session, COUNT)
    device.transport.up = lossy(seed)
    for turn in TURNS:
        prompt = [*session.tokens, *turn]
        session.extend(prompt)
        assert token_ids_of(session, COUNT) == answer_alone(GREEDY, prompt=prompt, count=COUNT)


class LateTransport(MemoryTransport):
    """What has arrived is seen only where the device waits."""

    def receive(self, timeout: float) -> bytes | None:
        return super().receive(timeout) if timeout else None


@pytest.mark.parametrize("window", [1, 8])
def test_a_turn_after_a_restart_with_another_window_is_opened_anew(window: int) -> None:
    device = Device(LateTransport(new_station()))
    settings = replace(GREEDY, drafts_ahead=None)
    session = device.session(settings, PROMPT)
    token_ids_of(session, COUNT)
    device.transport.station = Station(FakeTarget.make(TARGET), Limits(window=window))
    device.client.greet()
    prompt = [*session.tokens, 1]
    session.extend(prompt)
    assert token_ids_of(session, 40) == answer_alone(GREEDY, prompt=prompt)


def long_conversation(device: Device, station: Station) -> tuple[DeviceSession, list[int]]:
    """A session whose next prompt is longer than ``station`` takes in an Open."""
    session = device.session(GREEDY, PROMPT)
    while len(session.tokens) <= station.limits.max_prompt_len:
        token_ids_of(session, COUNT)
        session.extend([*session.tokens, 1])
    token_ids_of(session, COUNT)
    return session, [*session.tokens, 1]


def test_a_lost_extend_of_a_long_conversation_is_sent_again() -> None:
    station = Station(FakeTarget.make(TARGET), Limits(max_prompt_len=30))
    device = Device(MemoryTransport(station))
    session, prompt = long_conversation(device, station)
    device.transport.up = first_copies_lost(Extend)
    session.extend(prompt)
    assert token_ids_of(session, COUNT) == answer_alone(GREEDY, prompt=prompt, count=COUNT)


def test_a_long_conversation_whose_session_is_gone_names_the_limit() -> None:
    limits = Limits(max_prompt_len=30)
    device = Device(MemoryTransport(Station(FakeTarget.make(TARGET), limits)))
    session, prompt = long_conversation(device, device.transport.station)
    device.transport.station = Station(FakeTarget.make(TARGET), limits)
    with pytest.raises(ContextLengthError, match="--max-prompt-len"):
        session.extend(prompt)
    assert device.answer(GREEDY, PROMPT) == answer_alone(GREEDY, count=COUNT)


def test_a_turn_that_cannot_be_opened_anew_names_the_limit() -> None:
    device = Device(MemoryTransport(new_station()))
    session = device.session(GREEDY, PROMPT)
    token_ids_of(session, COUNT)
    device.transport.station = Station(FakeTarget.make(TARGET), Limits(max_prompt_len=10))
    session.extend([*session.tokens, 1])
    with pytest.raises(ContextLengthError, match="--max-prompt-len"):
        token_ids_of(session, COUNT)
    assert device.answer(GREEDY, PROMPT) == answer_alone(GREEDY, count=COUNT)


def test_a_prompt_that_was_sent_but_not_answered_is_extended() -> None:
    device = Device(MemoryTransport(new_station()))
    device.answer(GREEDY, PROMPT)
    session, start = device.session(GREEDY, PROMPT), len(device.transport.uplink)
    prompt = [*PROMPT, *TURNS[0]]
    session.extend(prompt)
    assert session.cached_tokens == len(PROMPT)
    assert token_ids_of(session, COUNT) == answer_alone(GREEDY, prompt=prompt, count=COUNT)
    assert not any(isinstance(message, Open) for message in sent_by(device.transport, start))


class RefusingLongPrompts(MemoryTransport):
    """A base station that refuses prompts of more tokens than ``most``."""

    most = 100

    def send(self, frame: bytes) -> None:
        message = self.station.codec.decode(frame)
        if isinstance(message, Open) and len(message.prompt_ids) > self.most:
            self.station.outboxes[self.peer].append(Fault(message.session_id, "context_length", "too long"))
            return
        super().send(frame)


def test_a_refused_prompt_does_not_refuse_the_next_one() -> None:
    transport = RefusingLongPrompts(new_station())
    device = Device(transport)
    device.answer(GREEDY, PROMPT)
    transport.most = 5
    session = device.session(GREEDY, PROMPT)
    with pytest.raises(FaultError, match="too long"):
        token_ids_of(session, COUNT)
    prompt = PROMPT[:3]
    session.extend(prompt)
    assert token_ids_of(session, COUNT) == answer_alone(GREEDY, prompt=prompt, count=COUNT)


def test_a_request_does_not_overtake_an_open_that_was_lost_with_its_connection() -> None:
    device = Device(MemoryTransport(new_station()))
    device.answer(GREEDY, PROMPT)
    transport, start = device.transport, len(device.transport.uplink)

    transport.up = lambda message: not isinstance(message, Open) or transport.connections > 1
    session = device.session(GREEDY, PROMPT[::-1])
    transport.connections += 1
    assert token_ids_of(session, COUNT) == answer_alone(GREEDY, prompt=PROMPT[::-1], count=COUNT)
    assert [type(message) for message in sent_by(transport, start)][:3] == [Open, Open, Draft]
