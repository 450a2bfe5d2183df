"""Invariant 3: outages of the link change no verified token, whether answers wait or the draft model goes on alone."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from device.drafting.drafter import DraftedToken
from device.session.session import Origin
from device.session.unverified_tail import UnverifiedTail
from device.settings import DraftSettings, Timeouts
from protocol.full_distribution import FullDistribution
from protocol.messages import DraftDistribution, Hello, Mode, Sampling
from protocol.sparse import SparseDistribution
from tests.fakes import blend, random_table, target_alone
from tests.outages import NEVER, OutagePair, Reader, verified_ids
from tests.p_values import FALSE_ALARM, SMALL, answers_p_value
from tests.timed_pair import PairTimes, TimedPair

VOCAB, COUNT, ANSWERS = 12, 80, 6
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.8)
GREEDY, SAMPLED = Sampling(), Sampling(0.8, seed=7)
OUTAGE_SECONDS = (1, 5, 60)
WAIT, DRAFT_ALONE = Timeouts(retry=300, resend=1), Timeouts(retry=300, resend=1, outage=0.5)


def expected(sampling: Sampling, prompt: Sequence[int]) -> list[int]:
    if sampling.greedy:
        return target_alone(TARGET, prompt, COUNT)
    pair = TimedPair(TARGET, DRAFT, PairTimes(0.01, 0.01))
    session = pair.session(DraftSettings(Mode.TARGET, sampling, 1, None), prompt)
    return [token.token_id for token in session.answer(COUNT)]


def random_prompt(chance: random.Random) -> list[int]:
    return [chance.randrange(VOCAB) for _ in range(chance.randrange(1, 12))]


@pytest.mark.parametrize("seconds", OUTAGE_SECONDS)
@pytest.mark.parametrize("timeouts", [WAIT, DRAFT_ALONE], ids=["wait", "draft"])
@pytest.mark.parametrize(
    ("mode", "sampling"), [(Mode.IDS, GREEDY), (Mode.COUPLED, SAMPLED), (Mode.TARGET, GREEDY), (Mode.TOPK, GREEDY)]
)
def test_an_outage_changes_no_verified_token(mode: Mode, sampling: Sampling, timeouts: Timeouts, seconds: int) -> None:
    chance, ended, replaced, unverified = random.Random(f"{mode} {seconds}"), 0, 0, 0  # noqa: S311
    for _ in range(ANSWERS):
        times = PairTimes(chance.choice([0.1, 1.5]), chance.choice([0.1, 0.4]), 0.01, chance.choice([0.01, 0.2]))
        settings = DraftSettings(
            mode,
            sampling,
            3,
            chance.choice([4, None]),
            drafts_ahead=chance.choice([0, None]),
            lookup=chance.random() < 0.5,
        )
        pair = OutagePair(TARGET, DRAFT, times, timeouts)
        begin, prompt = chance.uniform(0, 6), random_prompt(chance)
        pair.outages.append((begin, begin + seconds))
        reader = Reader()
        stream = pair.conversation(settings).ask(prompt, COUNT, show_unverified=reader.show_unverified)
        answer, right = reader.read(stream), expected(sampling, prompt)
        verified = verified_ids(answer)
        assert verified == right[: len(verified)]
        assert len(answer.token_ids) == COUNT
        assert reader.text == answer.text
        assert answer.unverified == COUNT - len(verified)
        ended, replaced, unverified = (
            ended + (answer.unverified == 0),
            replaced + reader.replaced,
            unverified + reader.seen,
        )
    assert ended > 0
    assert (unverified > 0) is (timeouts is DRAFT_ALONE)
    assert (replaced > 0) is (timeouts is DRAFT_ALONE)
    if timeouts is WAIT:
        assert ended == ANSWERS


@pytest.mark.parametrize(("mode", "sampling"), [(Mode.IDS, GREEDY), (Mode.COUPLED, SAMPLED)])
def test_fifty_answers_begun_offline_and_ended_online_are_the_targets_own(mode: Mode, sampling: Sampling) -> None:
    chance, accepted = random.Random(mode), 0  # noqa: S311
    for _ in range(50):
        times = PairTimes(0.1, chance.choice([0.02, 0.1]), 0.01, chance.choice([0.01, 0.2]))
        ahead = chance.choice([0, None])
        settings = DraftSettings(mode, sampling, 1, chance.choice([4, None]), drafts_ahead=ahead, lookup=True)
        pair = OutagePair(TARGET, DRAFT, times, DRAFT_ALONE, [(0, chance.uniform(1, 7))])
        reader, prompt = Reader(), random_prompt(chance)
        stream = pair.conversation(settings).ask(prompt, COUNT, show_unverified=reader.show_unverified)
        answer = reader.read(stream)
        assert answer.token_ids == expected(sampling, prompt)
        assert reader.text == answer.text
        assert answer.unverified == 0
        assert reader.seen > 0
        accepted += sum(origin is Origin.ACCEPTED for origin in answer.origins)
    assert accepted > 0


def test_a_base_station_that_is_never_reached_leaves_the_draft_model_alone() -> None:
    timeouts = Timeouts(connect=1.05, outage=5)  # the first Hello is given up between two looks for a reply
    pair, reader = OutagePair(TARGET, DRAFT, PairTimes(0.1, 0.1), timeouts, [(0, NEVER)]), Reader()
    stream = pair.conversation(DraftSettings(Mode.IDS, GREEDY, 1, 4)).ask([3], COUNT, (), reader.show_unverified)
    answer = reader.read(stream)
    assert answer.token_ids == target_alone(DRAFT, [3], COUNT)
    assert answer.unverified == COUNT


SMALL_DRAFT = blend(SMALL, random_table(3, seed=5, sharpness=0.8), 0.4)
PROMPT, LENGTH, SAMPLES = [0, 1, 2], 3, 600


def p_value(mode: Mode, samples: int, block_verification: bool = False) -> float:
    """Of the hypothesis that answers begun in an outage are distributed as the target's own."""
    sampling = Sampling(0.9)
    settings = DraftSettings(mode, sampling, 3, 3, uplink_p=1.0, block_verification=block_verification)
    pair = OutagePair(SMALL, SMALL_DRAFT, PairTimes(0.1, 0.01), Timeouts(outage=0.5, resend=1))
    conversation, counted = pair.conversation(settings), Counter[tuple[int, ...]]()
    for seed in range(samples):
        pair.outages.append((pair.now, pair.now + 1))
        conversation.settings = replace(settings, sampling=replace(sampling, seed=seed))
        reader = Reader()
        answer = reader.read(conversation.ask(PROMPT, 12, show_unverified=reader.show_unverified))
        assert reader.seen > 0
        assert answer.unverified == 0
        counted[tuple(answer.token_ids[:LENGTH])] += 1
    return answers_p_value(counted, SMALL, PROMPT, sampling)


@pytest.mark.parametrize(
    ("mode", "block_verification"), [(Mode.TOPK, False), (Mode.TOPP, False), (Mode.FULL, False), (Mode.TOPK, True)]
)
def test_answers_that_begin_in_an_outage_are_distributed_as_the_targets_own(
    mode: Mode, block_verification: bool
) -> None:
    assert p_value(mode, SAMPLES, block_verification) > FALSE_ALARM


@pytest.mark.parametrize("mode", [Mode.TOPK, Mode.FULL])
def test_a_tail_with_other_distributions_than_it_was_sampled_from_is_detected(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = UnverifiedTail.following

    def wrong(tail: UnverifiedTail, pending_ids: Sequence[int]) -> list[DraftedToken]:
        return [replace(token, distribution=improbable(token.token_id)) for token in following(tail, pending_ids)]

    def improbable(token_id: int) -> DraftDistribution:
        probs = np.where(np.arange(3) == token_id, 0.1, 0.45)
        if mode is Mode.FULL:
            return FullDistribution.quantize(probs)
        return SparseDistribution.quantize(3, np.arange(3), probs, 60)

    monkeypatch.setattr(UnverifiedTail, "following", wrong)
    assert p_value(mode, SAMPLES) < FALSE_ALARM


def test_an_answer_that_ends_in_an_outage_is_the_draft_models_own_after_the_verified_tokens() -> None:
    pair = OutagePair(TARGET, DRAFT, PairTimes(0.1, 0.1), DRAFT_ALONE, [(3, NEVER)])
    settings = DraftSettings(Mode.IDS, GREEDY, 1, 4)
    reader = Reader()
    answer = reader.read(pair.conversation(settings).ask([3, 1], COUNT, show_unverified=reader.show_unverified))
    verified = verified_ids(answer)
    assert 0 < len(verified) < COUNT
    assert answer.unverified == COUNT - len(verified)
    assert answer.token_ids == [*verified, *target_alone(DRAFT, [3, 1, *verified], answer.unverified)]


def test_a_long_outage_costs_few_bytes_but_hellos() -> None:
    pair = OutagePair(TARGET, DRAFT, PairTimes(0.5, 0.1), DRAFT_ALONE, [(2, 40)])
    settings = DraftSettings(Mode.IDS, GREEDY, 1, 4)
    reader = Reader()
    answer = reader.read(pair.conversation(settings).ask([3, 1], COUNT, show_unverified=reader.show_unverified))
    assert answer.token_ids == expected(GREEDY, [3, 1])
    greetings = sum(isinstance(message, Hello) for message in pair.lost)
    assert len(pair.lost) - greetings <= 2
    assert 30 < greetings < 45


def test_a_busy_base_station_is_no_outage() -> None:
    """Its engine takes long, but a Hello is answered in between."""
    pair = OutagePair(TARGET, DRAFT, PairTimes(0.1, 0.4, 0.01), DRAFT_ALONE)
    reader = Reader()
    stream = pair.conversation(DraftSettings(Mode.IDS, GREEDY, 1, 4)).ask(
        [3, 1, 4] * 500, 12, show_unverified=reader.show_unverified
    )
    answer = reader.read(stream)
    assert answer.ttft_seconds >= 0
    assert pair.now > 2
    assert reader.seen == 0


class StalledPair(OutagePair):
    """What reaches the base station during a stall, Hellos included, is processed at its end, and answered at once."""

    stall = 2.0, 12.0

    def _schedule(self, sent: float, frame: bytes, at_station: bool = False) -> None:
        begin, end = self.stall
        travel = self.times.round_trip / 2
        is_stalled = at_station and begin <= sent + travel < end
        super()._schedule(end - travel if is_stalled else sent, frame, at_station)


@pytest.mark.parametrize("forward", [0.3, 0.5])
@pytest.mark.parametrize("draft_len", [4, None])
def test_a_base_station_that_answers_probes_after_the_retry_timeout_verifies_the_answer(
    draft_len: int | None, forward: float
) -> None:
    pair = StalledPair(TARGET, DRAFT, PairTimes(0.2, forward, 0.01, 0.1), replace(DRAFT_ALONE, retry=3))
    reader, settings = Reader(), DraftSettings(Mode.IDS, GREEDY, 1, draft_len)
    answer = reader.read(pair.conversation(settings).ask([3, 1], COUNT, show_unverified=reader.show_unverified))
    assert pair.now > pair.stall[1]
    assert reader.seen > 0
    assert answer.token_ids == expected(GREEDY, [3, 1])
    assert answer.unverified == 0
