"""Drafts in flight while Verdicts travel: the answers are those of one Draft at a time."""

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from device.options import AnswerOptions
from device.planning.planner import MIN_BACKLOG, Planner
from device.session.session import DeviceSession
from device.settings import DraftSettings, Timeouts
from protocol.errors import FaultError, SettingsError
from protocol.limits import Limits
from protocol.messages import Draft, Message, Mode, Resume, Sampling, Verdict
from tests.fakes import DRAFT, TARGET, FakeDraftModel, FakeTarget, target_alone
from tests.invariants import (
    MAX_NEW_TOKENS,
    PROMPT,
    SETTINGS,
    TURNS,
    draft_model,
    lossy,
    new_station,
    settings_name,
    token_ids_of,
)
from tests.invariants import answer as lockstep_answer
from tests.link_pair import MemoryTransport, Station, join, open_session
from tests.outages import OutagePair, Reader
from tests.timed_pair import PairTimes

GREEDY, COUPLED = Sampling(), Sampling(0.9, seed=7)
DRAFTING = [settings for settings in SETTINGS if settings.mode is not Mode.TARGET]
DRAFTING.append(DraftSettings(Mode.COUPLED, COUPLED, 4, 4))

every_drafting_setting = pytest.mark.parametrize("settings", DRAFTING, ids=settings_name)


@dataclass
class LateTransport(MemoryTransport):
    """What has arrived is seen only now and then while the device drafts on."""

    chance: random.Random = field(default_factory=lambda: random.Random(3))  # noqa: S311
    seen: float = 0.3
    most_in_flight: int = 0
    _unanswered: int = 0

    def send(self, frame: bytes) -> None:
        self._unanswered += isinstance(self.station.codec.decode(frame), Draft)
        self.most_in_flight = max(self.most_in_flight, self._unanswered)
        super().send(frame)

    def receive(self, timeout: float) -> bytes | None:
        if not timeout and self.chance.random() > self.seen:
            return None
        frame = super().receive(timeout)
        if frame is not None and isinstance(self.station.codec.decode(frame), Verdict):
            self._unanswered = 0
        return frame


def ahead_session(transport: LateTransport, settings: DraftSettings, most: int | None = None) -> DeviceSession:
    model = draft_model()
    client, _ = join(transport.station, model, transport)
    return open_session(client, replace(settings, drafts_ahead=most), model, PROMPT)


@every_drafting_setting
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_answer_is_that_of_one_draft_at_a_time(settings: DraftSettings, most: int, seed: int) -> None:
    """With a fixed draft length also where it depends on the drafts: the rounds are the same."""
    transport = LateTransport(new_station(), seen=0.02, chance=random.Random(seed))  # noqa: S311
    assert token_ids_of(ahead_session(transport, settings, most)) == lockstep_answer(settings)
    assert transport.most_in_flight == most + 1


@every_drafting_setting
@pytest.mark.parametrize("seed", range(4))
def test_lost_repeated_and_late_messages_do_not_change_the_answer(settings: DraftSettings, seed: int) -> None:
    losses = lossy(seed), lossy(seed + 100)
    transport = LateTransport(new_station(), up=losses[0], down=losses[1], chance=random.Random(seed))  # noqa: S311
    assert token_ids_of(ahead_session(transport, settings)) == lockstep_answer(settings)


@every_drafting_setting
def test_an_abandoned_answer_leaves_the_next_turns_exact(settings: DraftSettings) -> None:
    transport = LateTransport(new_station(), seen=0.0)
    session = ahead_session(transport, settings)
    for turn in TURNS:
        for _, _ in zip(session.answer(MAX_NEW_TOKENS), range(3), strict=False):
            pass  # Drafts stay in flight
        prompt = [*session.tokens, *turn]
        session.extend(prompt)
        assert token_ids_of(session, 10) == lockstep_answer(settings, prompt=prompt, count=10)


@pytest.mark.parametrize("draft_len", [None, 3])
@pytest.mark.parametrize("restart_at", range(1, 30, 4))
def test_a_base_station_that_restarts_with_drafts_in_flight_changes_no_answer(
    draft_len: int | None, restart_at: int
) -> None:
    transport = LateTransport(new_station(), seen=0.1)
    session = ahead_session(transport, DraftSettings(Mode.IDS, GREEDY, 1, draft_len))
    tokens = []
    for token in session.answer(MAX_NEW_TOKENS):
        tokens.append(token.token_id)
        if len(tokens) == restart_at:
            transport.station = new_station()
    assert tokens == target_alone(TARGET, PROMPT, MAX_NEW_TOKENS)


def test_a_base_station_that_forgets_every_session_is_given_up() -> None:
    """An Open that succeeds is no proof that Drafts are answered."""
    transport = LateTransport(new_station())
    session = ahead_session(transport, DraftSettings(Mode.IDS, GREEDY, 1, 4))

    def forget_before(message: Message) -> int:
        if isinstance(message, Draft):
            transport.station = new_station()
        return 1

    transport.up = forget_before
    with pytest.raises(FaultError, match=r"not open|before Hello"):
        token_ids_of(session)
    assert transport.now > 30


@every_drafting_setting
@pytest.mark.parametrize("seed", range(4))
def test_tokens_run_one_by_one_whenever_the_verdict_comes(settings: DraftSettings, seed: int) -> None:
    """Otherwise the draft of an int8 model, and with it a sampled answer, would depend on the time."""
    transport = LateTransport(new_station(), chance=random.Random(seed))  # noqa: S311
    model = draft_model()
    client, _ = join(transport.station, model, transport)
    token_ids_of(open_session(client, replace(settings, drafts_ahead=3), model, PROMPT))
    assert set(cast(FakeDraftModel, model).passes[1:]) == {1}


def test_no_more_drafts_are_sent_than_the_base_station_allows() -> None:
    station = Station(FakeTarget.make(TARGET), Limits(window=2))
    transport = LateTransport(station, seen=0.0)
    settings = DraftSettings(Mode.IDS, GREEDY, 1, 2)
    assert token_ids_of(ahead_session(transport, settings)) == target_alone(TARGET, PROMPT, MAX_NEW_TOKENS)
    assert transport.most_in_flight == 2
    with pytest.raises(SettingsError, match="drafts-ahead is 2; allowed: 0 to 1"):
        ahead_session(transport, settings, most=2)


def test_origins_and_counts_are_those_of_one_draft_at_a_time() -> None:
    settings = DraftSettings(Mode.IDS, GREEDY, 1, 4)
    sessions = [ahead_session(LateTransport(new_station()), settings, most) for most in (0, 3)]
    first, second = ([token.origin for token in session.answer(MAX_NEW_TOKENS)] for session in sessions)
    one, other = (session.counters for session in sessions)
    assert first == second
    assert (one.rounds, one.drafted, one.accepted) == (other.rounds, other.drafted, other.accepted)
    assert (one.invalidated_bytes, other.invalidated_bytes > 0) == (0, True)


@every_drafting_setting
@pytest.mark.parametrize("seed", range(4))
def test_a_draft_without_tokens_while_the_prompt_runs_changes_no_answer(
    settings: DraftSettings, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = "device.planning.planner.Planner.decode_len"
    monkeypatch.setattr(planned, lambda _, backlog=0, __=0: int(backlog >= MIN_BACKLOG))
    prompt = np.random.default_rng(seed).integers(0, len(TARGET), 120).tolist()
    losses = lossy(seed), lossy(seed + 100)
    station = new_station()
    transport = LateTransport(station, up=losses[0], down=losses[1], chance=random.Random(seed), seen=0.1)  # noqa: S311
    model = draft_model()
    client, _ = join(transport.station, model, transport)
    drafting = replace(settings, draft_len=None, drafts_ahead=3)
    session = open_session(client, drafting, model, prompt)
    tokens = []
    for token in session.answer(MAX_NEW_TOKENS):
        tokens.append(token.token_id)
        if len(tokens) == 1 + seed:
            transport.station = new_station()
    if settings.mode.sends_ids_alone or settings.sampling.greedy:
        assert tokens == lockstep_answer(settings, prompt=prompt)
    assert len(tokens) == MAX_NEW_TOKENS


@pytest.mark.parametrize(
    ("server", "cores", "given", "found"),
    [
        ("tcp://127.0.0.1:5755", 8, "auto", 0),
        ("tcp://localhost:5755", 8, "auto", 0),
        ("tcp://127.0.0.1:5755", 2, "auto", None),  # confined to some of the cores
        ("tcp://10.0.0.5:5755", 8, "auto", None),
        ("tcp://127.0.0.1:5755", 8, "3", 3),
        ("tcp://10.0.0.5:5755", 8, "0", 0),
    ],
)
def test_auto_drafts_ahead_unless_both_ends_share_all_cores(
    server: str, cores: int, given: str, found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    options = AnswerOptions(bundle=Path("none"), server=server, mode="ids", drafts_ahead=given)
    assert options.draft_settings(GREEDY).drafts_ahead == found


@every_drafting_setting
@pytest.mark.parametrize("restarted", [False, True])
def test_a_turn_after_an_abandoned_answer_whose_verdicts_were_discarded_begins_at_once(
    settings: DraftSettings, restarted: bool
) -> None:
    """Between two turns a greeting, or another conversation, receives them; or the base station restarts."""
    transport = LateTransport(new_station(), seen=0.0)
    session = ahead_session(transport, settings)
    for _, _ in zip(session.answer(MAX_NEW_TOKENS), range(3), strict=False):
        pass
    began = transport.now
    while transport.receive(0.001) is not None:
        pass
    transport.station = new_station() if restarted else transport.station
    prompt = [*session.tokens, *TURNS[0]]
    session.extend(prompt)
    assert token_ids_of(session, 10) == lockstep_answer(settings, prompt=prompt, count=10)
    assert transport.now - began < 1


def test_the_time_between_two_turns_is_no_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    observed: list[float | None] = []
    observe = Planner.observe

    def note(planner: Planner, *args: Any) -> None:
        observed.extend(args[-2:])
        observe(planner, *args)

    monkeypatch.setattr(Planner, "observe", note)
    transport = LateTransport(new_station(), seen=0.0)
    session = ahead_session(transport, DraftSettings(Mode.IDS, GREEDY, 1, None))
    for _ in session.answer(MAX_NEW_TOKENS):
        if vars(session)["_rounds"].in_flight:
            break
    assert vars(session)["_rounds"].in_flight
    transport.now += 60
    session.extend([*session.tokens, *TURNS[0]])
    token_ids_of(session, 10)
    assert max(seconds or 0 for seconds in observed) < 60


def test_a_session_that_is_lost_while_its_first_token_is_awaited_is_opened_again() -> None:
    transport = LateTransport(new_station(), seen=1.0)
    session = ahead_session(transport, DraftSettings(Mode.IDS, GREEDY, 1, None))
    for count in (2, 1):
        prompt = [*session.tokens, *([3, 1] * MIN_BACKLOG), 5]
        session.extend(prompt)
        transport.station = new_station()
        assert token_ids_of(session, count) == target_alone(TARGET, prompt, count)


@pytest.mark.parametrize("draft_len", [None, 2])
@pytest.mark.parametrize(("seconds", "outage"), [(0.05, None), (1.0, 0.5)], ids=["reset", "outage"])
def test_drafts_that_were_lost_with_a_connection_are_sent_again_over_the_next(
    seconds: float, outage: float | None, draft_len: int | None
) -> None:
    timeouts, resumed = Timeouts(resend=1000, retry=2000, outage=outage), 0
    for begin in np.arange(0.3, 4, 0.07):
        pair = OutagePair(TARGET, DRAFT, PairTimes(0.1, 0.1, 0.01, 0.2), timeouts)
        pair.outages.append((pair.now + begin, pair.now + begin + seconds))
        drafting, reader = DraftSettings(Mode.IDS, GREEDY, 1, draft_len, drafts_ahead=None), Reader()
        stream = pair.conversation(drafting).ask(PROMPT, 60, show_unverified=reader.show_unverified)
        assert reader.read(stream).token_ids == target_alone(TARGET, PROMPT, 60)
        assert pair.now < timeouts.resend
        resumed += any(isinstance(message, Resume) for message in pair.sent)
    assert resumed > 0
