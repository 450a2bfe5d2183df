"""Prompt lookup: an n-gram search, and what a planner makes of its proposals."""

import random
from collections.abc import Sequence

import pytest

from device.drafting.no_draft_model import NoDraftModel
from device.drafting.prompt_lookup import MAX_MATCH, Match, PromptLookup, Proposal
from device.planning.planner import MAX_DRAFT_LEN, Planner
from device.planning.planner_lookup import LookupAcceptance
from device.session.session import Origin
from device.settings import DraftSettings
from protocol.messages import Decode, Draft, Mode, Sampling
from tests.fakes import QUALITY, manifest
from tests.lookup_sessions import CYCLE, follower, timed_answer
from tests.timed_pair import PairTimes, TimedPair


def proposed(
    tokens: Sequence[int], most: int = 5, prompt: Sequence[int] = (), prediction: Sequence[int] = ()
) -> Proposal | None:
    lookup = PromptLookup()
    lookup.begin(prompt, prediction)
    lookup.follow(tokens)
    return lookup.propose(list(tokens), most, frozenset({99}))


@pytest.mark.parametrize(
    ("tokens", "token_ids", "length"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 1, 2], (3, 4, 5, 6, 7), 2),
        ([1, 2, 3, 8, 1, 2, 4, 8, 9, 1, 2], (4, 8, 9, 1, 2), 2),  # the latest of two
        ([5, 1, 2, 3, 8, 6, 1, 2, 4, 8, 9, 5, 1, 2], (3, 8, 6, 1, 2), 3),  # the longest of two
        ([1, 2, 3, 99, 5, 1, 2], (3, 99), 2),  # up to a stop id
        ([7, 4, 7, 4, 7, 4], (7, 4, 7, 4, 7), 4),  # a text that repeats itself goes on
    ],
)
def test_what_followed_the_longest_match_is_proposed(
    tokens: list[int], token_ids: tuple[int, ...], length: int
) -> None:
    assert proposed(tokens) == Proposal(token_ids, Match(length))


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3, 2], [1, 2, 3, 4, 2, 2]])
def test_a_single_token_is_no_match(tokens: list[int]) -> None:
    assert proposed(tokens) is None


def test_a_prediction_is_proposed_from_its_start_and_where_it_goes_on() -> None:
    prompt, prediction = [*range(20, 50)], [1, 2, 3, 4, 5, 6]
    assert proposed(prompt, prompt=prompt, prediction=prediction) == Proposal((1, 2, 3, 4, 5), Match(MAX_MATCH, True))
    assert proposed([*prompt, 9, 3, 4], prompt=prompt, prediction=prediction) == Proposal((5, 6), Match(2, True))
    assert proposed([*prompt, *prediction], prompt=prompt, prediction=prediction) is None


def test_of_equal_matches_the_one_where_the_text_goes_on_is_taken() -> None:
    text = [1, 2, 3, 4, 5, 6, 10, 1, 2, 3, 4, 7, 8, 6, 10, 9]
    lookup, tokens = PromptLookup(), [*text, 1, 2, 3, 4, 5]
    lookup.follow(tokens)
    assert lookup.propose(tokens, 1, ()) == Proposal((6,), Match(5))
    assert lookup.propose([*tokens, 6, 10], 1, ()) == Proposal((1,), Match(7))
    lookup.follow([*tokens, 0, 6, 10])  # the copy goes on after a changed token
    assert lookup.propose([*tokens, 0, 6, 10], 1, ()) == Proposal((1,), Match(2))
    assert proposed([*text, 0, 6, 10], most=1) == Proposal((9,), Match(2))


def test_a_conversation_that_is_replaced_is_forgotten() -> None:
    lookup = PromptLookup()
    for tokens in ([1, 2, 3, 4, 1, 2], [1, 2, 3, 4, 1, 2, 5, 6, 1, 2], [1, 2, 9, 9, 1, 2], [8, 1, 2]):
        lookup.follow(tokens)
        fresh = PromptLookup()
        fresh.follow(tokens)
        assert lookup.propose(tokens, 4, ()) == fresh.propose(tokens, 4, ())


def test_proposals_are_those_of_a_slow_search() -> None:
    chance = random.Random(1)  # noqa: S311
    found = 0
    for _ in range(300):
        tokens = [chance.randrange(4) for _ in range(chance.randrange(40))]
        proposal = proposed(tokens, most=1)
        matches = [
            (_common_suffix(tokens[:place], tokens), place) for place in range(2, len(tokens)) if len(tokens) > 2
        ]
        length, place = max(matches, default=(0, 0))
        found += length > 1
        expected = Proposal((tokens[place],), Match(min(length, MAX_MATCH))) if length > 1 else None
        assert proposal == expected
    assert found > 100


def _common_suffix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return min(MAX_MATCH, next((count for count, (a, b) in enumerate(pairs) if a != b), len(one)))


def test_what_is_kept_of_a_text_of_one_pair_is_bounded() -> None:
    lookup = PromptLookup()
    lookup.begin([1], [7] * 100_000)
    lookup.follow([7] * 100_000)
    sizes = [len(places) for index in (lookup._conversation, lookup._prediction) for places in index._places.values()]
    assert max(sizes) == 64


def planner(target_seconds: float = 0.03, row_seconds: float = 0.001) -> Planner:
    started = Planner(QUALITY, greedy=True)
    started.start(target_seconds, row_seconds)
    started.observe_opened(0.001)
    return started


def test_a_proposal_is_sent_where_it_was_right_and_not_where_it_was_wrong() -> None:
    proposal = Proposal(tuple(range(40)), Match(4))
    good, bad = planner(), planner()
    for _ in range(20):
        good.observe_proposal(proposal, range(30))
        bad.observe_proposal(proposal, [50])
    assert good.lookup_len(proposal, can_draft=True) > 10
    assert good.lookup_len(proposal, can_draft=False) > 10
    assert bad.lookup_len(proposal, can_draft=True) == 0
    assert good.lookup_len(proposal, True, before=[Match(4)]) > 10
    assert good.lookup_len(proposal, True, before=[0.1] * 20) == 0
    assert bad.lookup_len(proposal, True, before=[Match(16)]) == 0


def test_a_proposal_whose_first_tokens_were_right_is_believed_as_a_longer_match_is() -> None:
    assert Match(3).after(2) == Match(5)
    assert Match(15, is_predicted=True).after(40) == Match(MAX_MATCH, is_predicted=True)
    learnt = LookupAcceptance()
    short, longer = Match(2), Match(4)
    for _ in range(20):  # half of the proposals are wrong from their first token, the others right to their end
        learnt.observe(Proposal((1, 2, 3, 4), short), [1, 2, 3, 4])
        learnt.observe(Proposal((1, 2, 3, 4), short), [9])
    assert learnt.of(short) == pytest.approx(0.5, abs=0.1)
    assert learnt.of(longer) > 0.85


def test_an_assumed_bonus_token_is_no_gain_of_the_draft_that_it_precedes() -> None:
    proposal = Proposal(tuple(range(40)), Match(2))
    one = planner(target_seconds=0.03, row_seconds=0.0)
    for _ in range(40):
        one.observe((1.0,) * 4, 3, 0.004, 0.031, 0.035)  # about 3.5 tokens in a pass of the target
        one.observe_proposal(proposal, [*range(3), 50])
    assert one.lookup_len(proposal, can_draft=True, before=[1.0]) == 0  # 3 tokens in a pass
    for _ in range(40):
        one.observe_proposal(proposal, [*range(12), 50])
    assert one.lookup_len(proposal, can_draft=True, before=[1.0]) >= 5


def test_longer_drafts_are_sent_where_verifying_a_token_costs_less() -> None:
    proposal = Proposal(tuple(range(40)), Match(4))
    lengths = []
    for row_seconds in (0.0001, 0.005, 0.02):
        one = planner(row_seconds=row_seconds)
        for _ in range(20):
            one.observe_proposal(proposal, [*range(6), 50])
        lengths.append(one.lookup_len(proposal, can_draft=False))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[2] >= 1


def test_nothing_is_looked_up_before_the_targets_speed_is_known() -> None:
    assert Planner(QUALITY, greedy=True).lookup_len(Proposal((1, 2), Match(9)), can_draft=True) == 0


TIMES = PairTimes(draft=0.012, forward=0.03, row=0.001, round_trip=0.001)
COPY = follower(CYCLE)


@pytest.mark.parametrize("ahead", [0, 3])
def test_where_the_text_repeats_itself_lookup_drafts_and_is_faster(ahead: int) -> None:
    """The draft model would be right too; it only takes time."""
    seconds = {}
    for lookup in (False, True):
        settings = DraftSettings(Mode.IDS, Sampling(), 1, None, drafts_ahead=ahead, lookup=lookup)
        tokens, seconds[lookup], _ = timed_answer(TimedPair(COPY, COPY, TIMES), settings, 300)
        looked_up = sum(token.origin is Origin.LOOKUP for token in tokens)
        assert (looked_up > 200) is lookup
    assert seconds[True] < seconds[False] / 1.25


def test_lookup_costs_nothing_where_it_finds_nothing() -> None:
    """Text whose pairs do not repeat: the target counts through its vocabulary."""
    count = 400
    table = follower(range(count))
    seconds = []
    for lookup in (False, True):
        settings = DraftSettings(Mode.IDS, Sampling(), 1, None, lookup=lookup)
        tokens, taken, _ = timed_answer(TimedPair(table, table, TIMES), settings, count - 10, prompt=[0, 1])
        assert not any(token.origin is Origin.LOOKUP for token in tokens)
        seconds.append(taken)
    assert seconds[1] == pytest.approx(seconds[0])


@pytest.mark.parametrize("round_trip", [0.001, 0.02, 0.1])
def test_without_a_draft_model_the_target_alone_loses_little(round_trip: float) -> None:
    count = 400
    table = follower(range(count))
    alone = DraftSettings(Mode.TARGET, Sampling(), 1, None)
    times = PairTimes(0.0, 0.03, 0.001, round_trip)
    seconds = []
    for settings in (alone, DraftSettings(Mode.IDS, Sampling(), 1, None, lookup=True)):
        pair = TimedPair(table, table, times)
        model = NoDraftModel(manifest(len(table)))
        tokens, taken, _ = timed_answer(pair, settings, count - 10, prompt=[0, 1], model=model)
        assert {token.origin for token in tokens} == {Origin.TARGET}
        seconds.append(taken)
    assert seconds[1] < seconds[0] / 0.95


def test_without_a_draft_model_repeated_text_is_drafted() -> None:
    settings = DraftSettings(Mode.IDS, Sampling(), 1, None, lookup=True)
    model = NoDraftModel(manifest(len(COPY)))
    pair = TimedPair(COPY, COPY, TIMES)
    tokens, taken, session = timed_answer(pair, settings, 300, model=model)
    assert {token.origin for token in tokens} >= {Origin.LOOKUP, Origin.TARGET}
    assert taken < 300 * TIMES.forward / 3
    assert session.counters.accepted > 0.9 * session.counters.drafted
    assert any(isinstance(message, Decode) for message in pair.sent)
    assert max(len(message.token_ids) for message in pair.sent if isinstance(message, Draft)) > MAX_DRAFT_LEN


def test_the_draft_model_catches_up_in_chunks_while_the_verdict_is_awaited() -> None:
    settings = DraftSettings(Mode.IDS, Sampling(), 1, None, lookup=True)
    pair = TimedPair(COPY, COPY, TIMES)
    timed_answer(pair, settings, 300)
    passes = pair.draft_passes
    assert sum(8 <= count <= 16 for count in passes) > 3
    assert sum(passes) < 2 * 300
