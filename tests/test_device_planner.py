"""The planner against the best fixed draft length, in simulated rounds and over a link in memory."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from statistics import fmean
from typing import cast

import pytest

from common.round_model import expected_tokens
from device.planning.planner import FIRST_DRAFT_LEN, MAX_DRAFT_LEN, Planner
from device.planning.planners import Planners
from device.planning.trials import MIN_WAIT, TRIAL, TRIAL_SHARE
from device.settings import DraftSettings
from protocol.messages import Decode, Draft, Mode, Sampling
from tests.fakes import QUALITY, FakeDraftModel, FakeTarget, random_table, target_alone
from tests.link_pair import MemoryTransport, Station, join, open_session
from tests.timed_pair import PairTimes, TimedPair


@dataclass(frozen=True)
class Times:
    """Simulated times in seconds.

    Attributes:
        draft: to draft a token.
        target: of a forward pass of the target, without drafted tokens.
        row: to verify a drafted token.
        link: the round trip.
        airtime: to send a drafted token.
    """

    draft: float
    target: float
    row: float = 0.0004
    link: float = 0.0
    airtime: float = 0.0

    def reply(self, draft_len: int) -> float:
        return self.link + self.target + (self.row + self.airtime) * draft_len


@dataclass
class Simulation:
    """Simulates an endless answer; ``token`` samples a drafted token's margin, or None, and whether it is accepted."""

    times: Times
    token: Callable[[random.Random], tuple[float | None, bool]]
    seed: int = 2
    tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)  # noqa: S311

    def tokens_per_second(self, planner: Planner | int, tokens: int = 8000) -> float:
        """The throughput with a planner or a fixed draft length; measured times have an error of up to 10 %."""
        self.tokens, self.seconds = 0, 0.0
        while self.tokens < tokens:
            alone = (0 if planner else 1) if isinstance(planner, int) else planner.decode_len()
            if alone:
                self.decode(planner, alone)
            else:
                self.round(planner)
        return self.tokens / self.seconds

    def decode(self, planner: Planner | int, count: int) -> None:
        first, further = self.times.reply(0), self.times.target * (count - 1)
        self.tokens += count
        self.seconds += self.times.target if isinstance(planner, int) else first + further
        if not isinstance(planner, int):
            planner.observe_decoded(count, self.error() * first, self.error() * further)

    def round(self, planner: Planner | int) -> None:
        margins: list[float | None] = []
        would_accept: list[bool] = []
        while len(margins) < planner if isinstance(planner, int) else planner.should_continue(margins):
            margin, accept = self.token(self.rng)
            margins.append(margin)
            would_accept.append(accept)
        accepted = [*would_accept, False].index(False)
        draft_seconds, reply_seconds = self.times.draft * len(margins), self.times.reply(len(margins))
        self.tokens += accepted + 1
        self.seconds += draft_seconds + reply_seconds
        if not isinstance(planner, int):
            drafting, reply = self.error() * draft_seconds, self.error() * reply_seconds
            planner.observe(margins, accepted, drafting, reply, drafting + reply)

    def error(self) -> float:
        return self.rng.uniform(0.9, 1.1)

    def best_fixed(self) -> float:
        """The largest throughput of all fixed draft lengths; 0 is the target alone."""
        return max(self.tokens_per_second(draft_len, 4000) for draft_len in range(MAX_DRAFT_LEN + 1))


def accepted_with(alpha: float) -> Callable[[random.Random], tuple[float | None, bool]]:
    return lambda rng: (None, rng.random() < alpha)


TIMES = [
    Times(0.006, 0.020),
    Times(0.010, 0.040, row=0.002),
    Times(0.006, 0.020, link=0.110),
    Times(0.011, 0.050, row=0.0017, link=0.020),
    Times(0.011, 0.050, row=0.0017, link=0.100),
    Times(0.030, 0.015, row=0.001, link=0.005),
    Times(0.011, 0.050, row=0.0017, airtime=0.786),  # the full vocabulary at 1 Mbit/s
    Times(0.011, 0.050, row=0.0017, link=0.050, airtime=0.016),
]


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8, 0.96])
@pytest.mark.parametrize("times", TIMES)
def test_throughput_without_margins_is_near_the_best_fixed_length(alpha: float, times: Times) -> None:
    def tokens_per_second(draft_len: int) -> float:
        return expected_tokens(alpha, draft_len) / (draft_len * times.draft + times.reply(draft_len))

    best = max(1 / times.target, *map(tokens_per_second, range(1, MAX_DRAFT_LEN + 1)))
    planned = (
        Simulation(times, accepted_with(alpha), seed).tokens_per_second(Planner(QUALITY, greedy=True))
        for seed in range(4)
    )
    assert fmean(planned) > 0.93 * best


@pytest.mark.parametrize("times", [TIMES[0], TIMES[1], TIMES[3], Times(0.006, 0.050, link=0.100)])
def test_throughput_with_informative_margins_exceeds_every_fixed_length(times: Times) -> None:
    def token(rng: random.Random) -> tuple[float, bool]:
        margin = rng.choice([0.05, *[1.5] * 6])
        return margin, rng.random() < (0.4 if margin < 1 else 0.98)

    simulation = Simulation(times, token)
    assert simulation.tokens_per_second(Planner(QUALITY, greedy=True)) > simulation.best_fixed()


def planned_len(planner: Planner) -> int:
    """How many tokens the planner drafts next."""
    margins: list[None] = []
    while planner.should_continue(margins):
        margins.append(None)
    return len(margins)


def test_drafts_become_longer_when_the_link_becomes_slow() -> None:
    planner = Planner(QUALITY, greedy=False)
    planner.observe_decoded(8, 0.020, 0.140)
    for _ in range(50):
        planner.observe([None] * 4, 3, 0.040, 0.020, 0.060)
    on_fast_link = planned_len(planner)
    for _ in range(50):
        planner.observe([None] * 4, 3, 0.040, 0.200, 0.240)
    assert on_fast_link < planned_len(planner)


@pytest.mark.parametrize("improves", [True, False])
def test_throughput_stays_near_the_best_when_times_change(improves: bool) -> None:
    good, bad = Times(0.006, 0.040), Times(0.006, 0.040, link=0.300)
    planner = Planner(QUALITY, greedy=True)
    Simulation(bad if improves else good, accepted_with(0.6)).tokens_per_second(planner, tokens=3000)
    after = Simulation(good if improves else bad, accepted_with(0.6))
    after.tokens_per_second(planner, tokens=2000)
    assert after.tokens_per_second(planner, tokens=3000) > 0.93 * after.best_fixed()


def test_estimates_converge_to_the_simulated_times() -> None:
    times = Times(0.010, 0.050, row=0.002, link=0.030)
    planners = [Planner(QUALITY, greedy=True) for _ in range(4)]
    for seed, planner in enumerate(planners):
        Simulation(times, accepted_with(0.7), seed).tokens_per_second(planner)
    estimated = planner.times
    assert fmean(planner.alpha for planner in planners) == pytest.approx(0.7, abs=0.1)
    assert estimated.draft_seconds == pytest.approx(times.draft, rel=0.05)
    assert estimated.target_seconds() == pytest.approx(times.target, rel=0.1)
    for draft_len in (2, 4, 8):
        expected = draft_len * times.draft + times.reply(draft_len)
        assert estimated.seconds(draft_len) == pytest.approx(expected, rel=0.1)


def test_first_request_measures_the_target_and_second_is_a_short_round() -> None:
    planner = Planner(QUALITY, greedy=True)
    planner.observe_opened(0.2)
    assert planner.decode_len() == TRIAL
    planner.observe_decoded(TRIAL, None, 0.1)
    assert planner.decode_len() == 0
    assert planned_len(planner) == FIRST_DRAFT_LEN


@pytest.mark.parametrize(("round_seconds", "wait"), [(0.15, MIN_WAIT), (1.0, round(9 / TRIAL_SHARE))])
def test_wait_between_trials_of_slower_drafting_follows_their_cost(round_seconds: float, wait: int) -> None:
    planner = Planner(QUALITY, greedy=True)
    planner.observe_decoded(TRIAL, 0.1, 0.1 * (TRIAL - 1))
    waits: list[int] = []
    tokens = 0
    while len(waits) < 40:
        count = planner.decode_len()
        if count:
            planner.observe_decoded(count, 0.1, 0.1 * (count - 1))
            tokens += count
        else:
            planner.observe([None], 0, 0.0, round_seconds, round_seconds)
            waits.append(tokens)
            tokens = 0
    assert waits[-2:] == [wait, wait]


@pytest.mark.parametrize("mode", [Mode.IDS, Mode.TOPK])
@pytest.mark.parametrize("cache_last_token", [True, False])
def test_each_forward_pass_of_a_round_runs_one_token(mode: Mode, cache_last_token: bool) -> None:
    """Even after full acceptance: the last drafted token runs while the device waits for the Verdict."""
    table = random_table(20, seed=1)
    station, model = Station(FakeTarget.make(table)), FakeDraftModel.make(table)
    transport, copies = MemoryTransport(station), cycle([1, 1, 0, 1, 2])
    client, _ = join(station, model, transport)
    transport.up = transport.down = lambda _: next(copies)
    settings = DraftSettings(mode, Sampling(), uplink_k=4, draft_len=4, cache_last_token=cache_last_token)
    passes = cast(FakeDraftModel, model).passes
    for prompt in ([3, 1, 4], [1, 5]):
        before = len(passes)
        answer = [token.token_id for token in open_session(client, settings, model, prompt).answer(60)]
        assert answer == target_alone(table, prompt, 60)
        rounds = passes[before + 1 :]
        assert set(rounds) == {1} if cache_last_token else {1, 2}


def test_wait_between_trials_of_the_slower_target_follows_their_cost() -> None:
    planner = Planner(QUALITY, greedy=True)
    planner.observe_decoded(TRIAL, 0.1, 0.1 * (TRIAL - 1))
    waits: list[int] = []
    tokens = 0
    while len(waits) < 20:
        if planner.decode_len():
            planner.observe_decoded(TRIAL, 0.1, 0.1 * (TRIAL - 1))
            waits.append(tokens)
            tokens = 0
        else:
            planner.observe([2.0] * 4, 4, 0.04, 0.11, 0.15)
            tokens += 5
    lost = 0.3 * 5 / 0.15 - TRIAL
    assert waits[-1] > 60 * lost


def test_target_that_becomes_fast_is_used_alone() -> None:
    slow, fast = Times(0.020, 0.080), Times(0.020, 0.010)
    planner = Planner(QUALITY, greedy=True)
    assert Simulation(slow, accepted_with(0.8)).tokens_per_second(planner, tokens=3000) > 1.2 / slow.target
    after = Simulation(fast, accepted_with(0.8))
    after.tokens_per_second(planner, tokens=2000)
    assert after.tokens_per_second(planner, tokens=3000) > 0.93 * after.best_fixed()


def test_round_without_drafted_tokens_changes_no_estimate() -> None:
    planner = Planner(QUALITY, greedy=True)
    planner.observe_decoded(TRIAL, 0.1, 0.02)
    before = planned_len(planner), planner.alpha
    planner.observe([], 0, 0.0, 100.0, 100.0)
    assert (planned_len(planner), planner.alpha) == before


def test_sessions_with_equal_settings_share_estimates() -> None:
    station, model = Station(FakeTarget.make(random_table(20, seed=1))), FakeDraftModel.make(random_table(20, seed=2))
    client, _ = join(station, model, MemoryTransport(station))
    settings = DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=None)
    planners = Planners(model.manifest.quality)
    initial_alpha = Planner(model.manifest.quality, greedy=True).alpha
    list(open_session(client, settings, model, [3, 1, 4], planners).answer(40))
    assert planners.for_settings(settings, client.welcome).alpha < initial_alpha / 2  # the two models rarely agree
    sampled = replace(settings, mode=Mode.COUPLED, sampling=Sampling(1.0))
    for other in (sampled, replace(settings, drafts_ahead=3)):
        assert planners.for_settings(other, client.welcome).alpha == initial_alpha


def test_rounds_of_a_fixed_length_do_not_change_the_estimates_of_auto() -> None:
    station, model = Station(FakeTarget.make(random_table(20, seed=1))), FakeDraftModel.make(random_table(20, seed=2))
    client, _ = join(station, model, MemoryTransport(station))
    planned = DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=None)
    planners = Planners(model.manifest.quality)
    before = planners.for_settings(planned, client.welcome).alpha
    list(open_session(client, replace(planned, draft_len=2), model, [3, 1, 4], planners).answer(40))
    assert planners.for_settings(planned, client.welcome).alpha == before


def test_target_decodes_alone_where_drafts_are_slow_and_drafting_is_tried_again() -> None:
    table = random_table(20, seed=1)
    pair = TimedPair(table, random_table(20, seed=2), PairTimes(draft=0.02, forward=0.05))
    session = pair.session(DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=None), [3, 1, 4])
    answer = [token.token_id for token in session.answer(1200)]
    kinds = [type(message) for message in pair.sent]
    assert answer == target_alone(table, [3, 1, 4], 1200)
    assert sum(message.count for message in pair.sent if isinstance(message, Decode)) > 1000
    assert Draft in kinds[len(kinds) - kinds[::-1].index(Decode) - 4 :]


@pytest.mark.parametrize("mode", [Mode.IDS, Mode.TARGET])
def test_answer_abandoned_while_the_target_decodes_does_not_affect_the_next(mode: Mode) -> None:
    table = random_table(20, seed=1)
    station, model = Station(FakeTarget.make(table)), FakeDraftModel.make(random_table(20, seed=2))
    client, _ = join(station, model, MemoryTransport(station))
    session = open_session(client, DraftSettings(mode, Sampling(), uplink_k=1, draft_len=None), model, [3, 1, 4])
    abandoned = session.answer(200)
    next(abandoned)  # the target decodes the first tokens alone
    del abandoned
    session.extend([3, 1, 5])
    assert [token.token_id for token in session.answer(20)] == target_alone(table, [3, 1, 5], 20)


def test_drafting_ends_earlier_after_a_smaller_margin_before_any_was_observed() -> None:
    def len_after(margin: float) -> int:
        planner = Planner(QUALITY, greedy=True)
        planner.observe_decoded(TRIAL, 0.1, 0.1)
        planner.observe([2.0] * 4, 4, 0.040, 0.060, 0.100)
        margins = [margin] * 3
        while planner.should_continue(margins):
            margins.append(2.0)
        return len(margins)

    assert len_after(0.05) < len_after(0.2) < len_after(0.3)


def measured_planner(target_seconds: float = 0.03) -> Planner:
    """Knows the target's speed on a link of 100 ms."""
    planner = Planner(QUALITY, greedy=True)
    planner.observe_opened(0.1)
    planner.observe_decoded(TRIAL, 0.1 + target_seconds, (TRIAL - 1) * target_seconds)
    return planner


def test_drafting_slower_than_the_target_is_given_up_after_one_round() -> None:
    planner = measured_planner()
    planner.observe([2.0] * 4, 4, 4 * 0.031, 0.13, 0.254)
    assert planner.decode_len() > 0
    faster = measured_planner()
    faster.observe([2.0] * 4, 4, 4 * 0.029, 0.13, 0.246)
    assert faster.decode_len() == 0


def test_drafts_without_a_pause_between_them_are_one_observation() -> None:
    rounds = [(0, 0.1), (4, 0.02), (1, 0.3), (4, 0.05), (2, 0.01)]
    planners = [measured_planner() for _ in range(2)]
    for planner, order in zip(planners, (rounds, rounds[::-1]), strict=True):
        planner.observe([None] * 4, 4, 0.016, 0.13, 0.146)
        for accepted, seconds in order:  # nothing fades between them
            planner.observe([None] * 4, accepted, 0.016, None, seconds)
    one, other = planners
    assert one.alpha == pytest.approx(other.alpha)
    assert one.tokens_per_second == pytest.approx(other.tokens_per_second)


def test_an_assumed_bonus_token_counts_as_a_drafted_one_where_it_is_chosen_likewise() -> None:
    planner = measured_planner()
    before = planner.alpha
    planner.observe_assumed(2.0, False, is_argmax=False)
    assert planner.alpha == before
    planner.observe_assumed(2.0, False, is_argmax=True)
    assert planner.alpha < before


def test_drafting_ahead_ends_where_all_of_it_is_hardly_accepted() -> None:
    planner = measured_planner()
    planner.drafts_ahead = 3
    for _ in range(30):
        planner.observe([0.1, 2.0, 2.0], 0, 0.012, 0.13, 0.142)
        planner.observe([2.0] * 3, 3, 0.012, 0.13, 0.142)
    assert planner.should_draft_ahead([2.0] * 8, [], may_send=False)
    assert not planner.should_draft_ahead([0.1, 2.0], [], may_send=False)


def test_a_draft_with_an_uncertain_token_is_sent_at_once() -> None:
    planner = measured_planner()
    planner.drafts_ahead = 3
    for _ in range(30):
        for accepted in (3, 0, 0):
            planner.observe([0.1, 2.0, 2.0], accepted, 0.012, 0.13, 0.142)
        planner.observe([2.0] * 3, 3, 0.012, 0.13, 0.142)
    assert planner.should_draft_ahead([], [2.0], may_send=True)
    assert planner.should_draft_ahead([], [0.1], may_send=False)
    assert not planner.should_draft_ahead([], [0.1], may_send=True)


def test_pieces_of_the_target_alone_are_longer_while_the_draft_model_keeps_their_last_token_waiting() -> None:
    planner = measured_planner(target_seconds=0.3)
    planner.observe_prefill(16, 0.16)
    waiting = planner.decode_piece(100, running=16) - planner.decode_piece(100)
    assert waiting == pytest.approx(8 * 0.01 / (0.3 / 40), abs=1)


def test_of_many_temperatures_the_last_ones_are_remembered() -> None:
    station, model = Station(FakeTarget.make(random_table(20, seed=1))), FakeDraftModel.make(random_table(20, seed=2))
    welcome = join(station, model, MemoryTransport(station))[0]
    welcome.greet()
    planners = Planners(model.manifest.quality)

    def planner(temperature: float) -> Planner:
        settings = DraftSettings(Mode.COUPLED, Sampling(temperature), uplink_k=1, draft_len=None)
        return planners.for_settings(settings, welcome.welcome)

    first, second = planner(0.5), planner(0.6)
    for index in range(63):
        planner(1 + index / 100)
        assert planner(0.5) is first
    assert planner(0.6) is not second
