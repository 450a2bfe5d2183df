"""Drafts ahead in simulated time: throughput, and when drafting begins."""

import random
from dataclasses import replace
from itertools import cycle
from statistics import fmean

import numpy as np
import pytest

from common.round_model import RoundTimes, run_tokens
from device.planning.planner import Planner
from device.planning.trials import TRIAL
from device.session.session import DeviceSession
from device.settings import DraftSettings
from protocol.messages import Decode, Draft, Mode, Sampling
from tests.fakes import PROMPT, TARGET, Table, blend, manifest, random_table, target_alone
from tests.invariants import MAX_NEW_TOKENS, token_ids_of
from tests.planner_grid import Guess, GuessingDraftModel
from tests.timed_pair import PairTimes, TimedPair

GREEDY, COUPLED = Sampling(), Sampling(0.9, seed=7)
SLOW_LINK, LOOPBACK = PairTimes(0.008, 0.035, 0.001, 0.1), PairTimes(0.012, 0.05, 0.002, 0.0005)
SLOW_TARGET = PairTimes(0.023, 0.35, 0.02, 0.001)
LARGE_TABLE = random_table(64, seed=1, sharpness=3.0)
GOOD_DRAFT = blend(LARGE_TABLE, random_table(64, seed=2, sharpness=3.0), 0.99)


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


@pytest.mark.parametrize("drafts_ahead", [0, None], ids=["one at a time", "ahead"])
def test_the_last_token_takes_no_round_of_its_own(drafts_ahead: int | None) -> None:
    settings = DraftSettings(Mode.IDS, GREEDY, 1, None, drafts_ahead=drafts_ahead)
    pair = TimedPair(LARGE_TABLE, LARGE_TABLE, SLOW_LINK)
    list(pair.session(settings, [3, 1, 4]).answer(200))
    for tokens in range(40, 64):
        session, sent = pair.session(settings, [3, 1, 4]), len(pair.sent)
        list(session.answer(tokens))
        drafts = [message for message in pair.sent[sent:] if isinstance(message, Draft)]
        assert drafts
        assert all(draft.token_ids for draft in drafts)


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


def test_a_long_prompt_runs_in_chunks_that_shorten_towards_its_end() -> None:
    pair = TimedPair(LARGE_TABLE, GOOD_DRAFT, SLOW_LINK)
    session = pair.session(DraftSettings(Mode.IDS, GREEDY, 1, None, drafts_ahead=None), [3, 1, 4, 1] * 200)
    list(session.answer(8))
    chunks = [tokens for tokens in pair.draft_passes if tokens >= 8]
    assert chunks == sorted(chunks, reverse=True)
    assert chunks[0] == 64
    assert 8 <= chunks[-1] <= 16


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


def test_a_draft_after_tokens_of_the_target_alone_follows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another was begun before them, on an assumed bonus token that was right."""
    decode_lens = cycle([0, 0, TRIAL])
    monkeypatch.setattr(Planner, "decode_len", lambda *_: next(decode_lens))
    monkeypatch.setattr(Planner, "should_draft_ahead", lambda _, __, margins, ___: len(margins) < 4)
    pair = TimedPair(TARGET, TARGET, PairTimes(0.05, 0.05, 0.0, 0.02))
    session = pair.session(DraftSettings(Mode.IDS, GREEDY, 1, None, drafts_ahead=None), PROMPT)
    assert token_ids_of(session) == target_alone(TARGET, PROMPT, MAX_NEW_TOKENS)
    assert session.counters.accepted == session.counters.drafted > 0
    assert any(isinstance(message, Decode) for message in pair.sent)
