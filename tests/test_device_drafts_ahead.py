"""Drafts in flight while Verdicts travel: the same answers, sooner."""

import random
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import pytest

from common.round_model import RoundTimes, run_tokens
from device.options import AnswerOptions
from device.planning.planner import MIN_BACKLOG, Planner
from device.planning.trials import TRIAL
from device.session.session import DeviceSession
from device.settings import DraftSettings, Timeouts
from protocol.errors import FaultError, SettingsError
from protocol.limits import Limits
from protocol.messages import Decode, Draft, Message, Mode, Resume, Sampling, Verdict
from tests.fakes import FakeDraftModel, FakeTarget, Table, blend, manifest, random_table, target_alone
from tests.invariants import DRAFT, MAX_NEW_TOKENS, PROMPT, SETTINGS, TARGET, TURNS, draft_model, lossy, settings_name
from tests.invariants import answer as lockstep_answer
from tests.link_pair import MemoryTransport, Station, join, open_session
from tests.outages import OutagePair, Reader
from tests.planner_grid import Guess, GuessingDraftModel
from tests.timed_pair import PairTimes, TimedPair

GREEDY, COUPLED = Sampling(), Sampling(0.9, seed=7)
SLOW_LINK, LOOPBACK = PairTimes(0.008, 0.035, 0.001, 0.1), PairTimes(0.012, 0.05, 0.002, 0.0005)
SLOW_TARGET = PairTimes(0.023, 0.35, 0.02, 0.001)
LARGE_TABLE = random_table(64, seed=1, sharpness=3.0)
GOOD_DRAFT = blend(LARGE_TABLE, random_table(64, seed=2, sharpness=3.0), 0.99)
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


def new_station() -> Station:
    return Station(FakeTarget.make(TARGET))


def ahead_session(transport: LateTransport, settings: DraftSettings, most: int | None = None) -> DeviceSession:
    model = draft_model()
    client, _ = join(transport.station, model, transport)
    return open_session(client, replace(settings, drafts_ahead=most), model, PROMPT)


def tokens_of(session: DeviceSession, count: int = MAX_NEW_TOKENS) -> list[int]:
    return [token.token_id for token in session.answer(count)]


@every_drafting_setting
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_answer_is_that_of_one_draft_at_a_time(settings: DraftSettings, most: int, seed: int) -> None:
    """With a fixed draft length also where it depends on the drafts: the rounds are the same."""
    transport = LateTransport(new_station(), seen=0.02, chance=random.Random(seed))  # noqa: S311
    assert tokens_of(ahead_session(transport, settings, most)) == lockstep_answer(settings)
    assert transport.most_in_flight == most + 1


@every_drafting_setting
@pytest.mark.parametrize("seed", range(4))
def test_lost_repeated_and_late_messages_do_not_change_the_answer(settings: DraftSettings, seed: int) -> None:
    losses = lossy(seed), lossy(seed + 100)
    transport = LateTransport(new_station(), up=losses[0], down=losses[1], chance=random.Random(seed))  # noqa: S311
    assert tokens_of(ahead_session(transport, settings)) == lockstep_answer(settings)


@every_drafting_setting
def test_an_abandoned_answer_leaves_the_next_turns_exact(settings: DraftSettings) -> None:
    transport = LateTransport(new_station(), seen=0.0)
    session = ahead_session(transport, settings)
    for turn in TURNS:
        for _, _ in zip(session.answer(MAX_NEW_TOKENS), range(3), strict=False):
            pass  # Drafts stay in flight
        prompt = [*session.tokens, *turn]
        session.extend(prompt)
        assert tokens_of(session, 10) == lockstep_answer(settings, prompt=prompt, count=10)


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
        tokens_of(session)
    assert transport.now > 30


@every_drafting_setting
@pytest.mark.parametrize("seed", range(4))
def test_tokens_run_one_by_one_whenever_the_verdict_comes(settings: DraftSettings, seed: int) -> None:
    """Otherwise the draft of an int8 model, and with it a sampled answer, would depend on the time."""
    transport = LateTransport(new_station(), chance=random.Random(seed))  # noqa: S311
    model = draft_model()
    client, _ = join(transport.station, model, transport)
    tokens_of(open_session(client, replace(settings, drafts_ahead=3), model, PROMPT))
    assert set(cast(FakeDraftModel, model).passes[1:]) == {1}


def test_no_more_drafts_are_sent_than_the_base_station_allows() -> None:
    station = Station(FakeTarget.make(TARGET), Limits(window=2))
    transport = LateTransport(station, seen=0.0)
    settings = DraftSettings(Mode.IDS, GREEDY, 1, 2)
    assert tokens_of(ahead_session(transport, settings)) == target_alone(TARGET, PROMPT, MAX_NEW_TOKENS)
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


def measured(times: PairTimes, settings: DraftSettings, tokens: int = 400) -> tuple[float, DeviceSession, TimedPair]:
    """Tokens per second in simulated time after a first answer, the session, and the pair."""
    pair = TimedPair(LARGE_TABLE, GOOD_DRAFT, times)
    session = pair.session(settings, [3, 1, 4])
    list(session.answer(100))
    session.counters.draft_bytes = session.counters.invalidated_bytes = 0
    began, before = pair.now, len(session.tokens)
    list(session.answer(tokens))
    return (len(session.tokens) - before) / (pair.now - began), session, pair


@pytest.mark.parametrize(("times", "gain"), [(SLOW_LINK, 1.4), (LOOPBACK, 1.1)], ids=["100 ms", "loopback"])
def test_drafting_ahead_beats_the_best_fixed_draft_length(times: PairTimes, gain: float) -> None:
    one_at_a_time = DraftSettings(Mode.COUPLED, COUPLED, 1, None)
    fixed = [measured(times, replace(one_at_a_time, draft_len=one))[0] for one in (4, 8, 12, 16)]
    ahead, session, _ = measured(times, replace(one_at_a_time, drafts_ahead=None))
    assert ahead > gain * max(fixed)
    assert session.counters.invalidated_bytes < 0.35 * session.counters.draft_bytes


@pytest.mark.parametrize("draft_len", [1, 2, 6])
@pytest.mark.parametrize("acceptance", [0.35, 0.6, 0.9])
@pytest.mark.parametrize("times", [SLOW_LINK, LOOPBACK, SLOW_TARGET], ids=["100 ms", "loopback", "slow target"])
def test_the_round_model_predicts_the_throughput_of_drafts_ahead(
    times: PairTimes, acceptance: float, draft_len: int
) -> None:
    chance = random.Random(5)  # noqa: S311
    guesses = [Guess(2.0, chance.random() < acceptance) for _ in range(1000)]
    pair = TimedPair(LARGE_TABLE, LARGE_TABLE, times)
    model = GuessingDraftModel(
        LARGE_TABLE, manifest(64), run_for=pair.run_for, draft_seconds=times.draft, guesses=guesses
    )
    session = pair.session(DraftSettings(Mode.IDS, GREEDY, 1, draft_len, drafts_ahead=3), [3, 1, 4], model=model)
    list(session.answer(50))
    began, start = pair.now, len(session.tokens)
    list(session.answer(800))
    end = len(session.tokens)
    alpha = fmean(guess.is_right for guess in guesses[start:end])
    rounds = RoundTimes(times.draft, lambda drafted: times.forward + times.row * drafted, times.round_trip)
    predicted = run_tokens(alpha) / rounds.run_seconds(alpha, draft_len, 3)
    assert (end - start) / (pair.now - began) == pytest.approx(predicted, rel=0.05)


def after_change(draft_table: Table, before: PairTimes, after: PairTimes, settings: DraftSettings) -> float:
    """Tokens per second from ten rounds after a change of the link on."""
    pair = TimedPair(LARGE_TABLE, draft_table, before)
    session = pair.session(settings, [3, 1, 4])
    tokens = session.answer(1000)
    next(token for token in tokens if len(session.tokens) > 250)
    pair.times, changed = after, session.counters.rounds
    next(token for token in tokens if session.counters.rounds >= changed + 10 or len(session.tokens) > 450)
    began, start = pair.now, len(session.tokens)
    next(token for token in tokens if len(session.tokens) >= start + 400)
    return (len(session.tokens) - start) / (pair.now - began)


@pytest.mark.parametrize(("share", "needed"), [(0.9, 0.9), (0.99, 0.95)], ids=["fair drafts", "good drafts"])
@pytest.mark.parametrize("improves", [False, True])
def test_ten_rounds_after_the_link_changes_drafts_have_nearly_the_best_length(
    share: float, needed: float, improves: bool
) -> None:
    fast, slow = (PairTimes(0.01, 0.045, 0.003, *link) for link in ((0.02, 50e6 / 8), (0.15, 1e6 / 8)))
    before, after = (slow, fast) if improves else (fast, slow)
    draft_table = blend(LARGE_TABLE, random_table(64, seed=2, sharpness=3.0), share)
    planned = DraftSettings(Mode.COUPLED, COUPLED, 1, None, drafts_ahead=None)
    fixed = [after_change(draft_table, after, after, replace(planned, draft_len=one)) for one in (3, 6)]
    assert after_change(draft_table, before, after, planned) > needed * max(fixed)


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("times", [SLOW_LINK, LOOPBACK], ids=["100 ms", "loopback"])
def test_poor_drafts_cost_little(times: PairTimes, share: float) -> None:
    draft_table = blend(LARGE_TABLE, random_table(64, seed=2, sharpness=3.0), share)
    pair = TimedPair(LARGE_TABLE, draft_table, times)
    session = pair.session(DraftSettings(Mode.IDS, GREEDY, 1, None, drafts_ahead=None), [3, 1, 4])
    list(session.answer(1500))
    assert 1500 / pair.now > 0.93 / times.forward


def test_the_answer_begins_while_the_draft_model_still_runs_the_prompt() -> None:
    """Otherwise the first token would come after 1,500 tokens of the draft model."""
    prompt = np.random.default_rng(1).integers(0, 64, 1500).tolist()

    def first_tokens(mode: Mode) -> list[float]:
        """Of a process that knows nothing, and of one that has answered before."""
        pair, seconds = TimedPair(LARGE_TABLE, GOOD_DRAFT, replace(SLOW_LINK, draft=0.016)), []
        for unseen in (prompt, prompt[::-1]):
            began = pair.now
            session = pair.session(DraftSettings(mode, GREEDY, 1, None, drafts_ahead=None), unseen)
            next(answer := session.answer(200))
            seconds.append(pair.now - began)
            list(answer)
            session.close()
        return seconds

    for drafting, alone in zip(first_tokens(Mode.IDS), first_tokens(Mode.TARGET), strict=True):
        assert drafting < 1.1 * alone


def test_drafting_begins_once_the_draft_model_has_run_the_prompt() -> None:
    prompt = np.random.default_rng(1).integers(0, 64, 1500).tolist()
    pair = TimedPair(LARGE_TABLE, GOOD_DRAFT, SLOW_LINK)
    session = pair.session(DraftSettings(Mode.IDS, GREEDY, 1, None, drafts_ahead=None), prompt)
    answer = [token.token_id for token in session.answer(200)]
    assert answer == target_alone(LARGE_TABLE, prompt, 200)
    assert session.counters.accepted > 60


@pytest.mark.parametrize("ahead", [0, None])
def test_drafting_begins_at_once_where_the_target_takes_longer_to_run_the_prompt(ahead: int | None) -> None:
    """Of 1,000 tokens: 1 s for the draft model and 3 s for the target."""
    prompts = np.random.default_rng(1).integers(0, 64, (3, 1000)).tolist()
    pair = TimedPair(LARGE_TABLE, GOOD_DRAFT, replace(LOOPBACK, draft=0.008, row=0.003))
    for prompt in prompts:
        session = pair.session(DraftSettings(Mode.IDS, GREEDY, 1, None, drafts_ahead=ahead), prompt)
        assert [token.token_id for token in session.answer(60)] == target_alone(LARGE_TABLE, prompt, 60)
        assert session.counters.accepted > 30
        session.close()


def test_the_target_decodes_on_where_the_draft_model_takes_longer_to_run_the_prompt() -> None:
    """Of 300 tokens: 1 s for the draft model and .05 s for the target, as a first answer has shown."""
    prompts = np.random.default_rng(1).integers(0, 64, (2, 300)).tolist()
    pair = TimedPair(LARGE_TABLE, GOOD_DRAFT, PairTimes(0.027, 0.035, 0.0001, 0.1))
    for prompt in prompts:
        session = pair.session(DraftSettings(Mode.IDS, GREEDY, 1, None, drafts_ahead=None), prompt)
        opened = len(pair.sent)
        list(session.answer(60))
        session.close()
    first = pair.sent[opened]
    assert isinstance(first, Decode)
    assert first.count > 15


def test_drafting_ahead_begins_before_the_first_token_of_the_target_has_arrived() -> None:
    """The draft model runs a prompt of 64 tokens in less time than a reply takes."""
    prompts = np.random.default_rng(1).integers(0, 64, (2, 64)).tolist()
    pair = TimedPair(LARGE_TABLE, GOOD_DRAFT, replace(SLOW_LINK, round_trip=0.2))
    for prompt in prompts:
        session = pair.session(DraftSettings(Mode.IDS, GREEDY, 1, None, drafts_ahead=None), prompt)
        opened = len(pair.sent)
        tokens = [next(answer := session.answer(40)).token_id]
        sent = pair.sent[opened:]
        tokens += [token.token_id for token in answer]
        assert tokens == target_alone(LARGE_TABLE, prompt, 40)
        session.close()
    first, second, *_ = (message for message in sent if isinstance(message, Draft))
    assert (len(first.token_ids), second.assumed_bonus) == (0, tokens[0])
    assert second.token_ids[:2] == tuple(tokens[1:3])


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
    assert tokens_of(session, 10) == lockstep_answer(settings, prompt=prompt, count=10)
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
    tokens_of(session, 10)
    assert max(seconds or 0 for seconds in observed) < 60


def test_a_session_that_is_lost_while_its_first_token_is_awaited_is_opened_again() -> None:
    transport = LateTransport(new_station(), seen=1.0)
    session = ahead_session(transport, DraftSettings(Mode.IDS, GREEDY, 1, None))
    for count in (2, 1):
        prompt = [*session.tokens, *([3, 1] * MIN_BACKLOG), 5]
        session.extend(prompt)
        transport.station = new_station()
        assert tokens_of(session, count) == target_alone(TARGET, prompt, count)


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


def test_a_draft_after_tokens_of_the_target_alone_follows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another was begun before them, on an assumed bonus token that was right."""
    decode_lens = cycle([0, 0, TRIAL])
    monkeypatch.setattr(Planner, "decode_len", lambda *_: next(decode_lens))
    monkeypatch.setattr(Planner, "should_draft_ahead", lambda _, __, margins, ___: len(margins) < 4)
    pair = TimedPair(TARGET, TARGET, PairTimes(0.05, 0.05, 0.0, 0.02))
    session = pair.session(DraftSettings(Mode.IDS, GREEDY, 1, None, drafts_ahead=None), PROMPT)
    assert tokens_of(session) == target_alone(TARGET, PROMPT, MAX_NEW_TOKENS)
    assert session.counters.accepted == session.counters.drafted > 0
    assert any(isinstance(message, Decode) for message in pair.sent)
