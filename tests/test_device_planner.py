"""The live plan against the best one in hindsight, in simulated rounds and over a link in memory."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from statistics import fmean
from typing import cast

import pytest

from device.planner import FIRST_DRAFT_LEN, MAX_DRAFT_LEN, SHORTEST_WAIT, TRIAL, TRIALS_SHARE, Planner
from device.round_model import expected_tokens
from device.session import DraftSettings
from protocol.bundle import QualityFigures
from protocol.messages import Decode, Draft, Mode, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, random_table, target_alone
from tests.link_pair import MemoryTransport, Station, join

GATE = QualityFigures(argmax_agreement=0.9, overlap=0.8, topk_acceptance=0.7, coupled_acceptance=0.8, positions=100)


@dataclass(frozen=True)
class Times:
    """Seconds: to draft a token, of a pass, more of that for each drafted token, of the link, and to send a token."""

    draft: float
    target: float
    row: float = 0.0004
    link: float = 0.0
    airtime: float = 0.0

    def reply(self, draft_len: int) -> float:
        return self.link + self.target + (self.row + self.airtime) * draft_len


@dataclass
class Simulation:
    """An endless answer; ``token`` draws a drafted token: its margin, or None, and whether it would stand."""

    times: Times
    token: Callable[[random.Random], tuple[float | None, bool]]
    seed: int = 2
    tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)  # noqa: S311

    def tokens_per_second(self, planner: Planner | int, tokens: int = 8000) -> float:
        """As ``planner`` decides, or with a fixed draft length; measured times are off by up to a tenth."""
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
            planner.observe_decoded(count, self.off() * first, self.off() * further)

    def round(self, planner: Planner | int) -> None:
        margins: list[float | None] = []
        stands: list[bool] = []
        while len(margins) < planner if isinstance(planner, int) else planner.should_continue(margins):
            margin, stand = self.token(self.chance)
            margins.append(margin)
            stands.append(stand)
        accepted = [*stands, False].index(False)
        draft_seconds, reply_seconds = self.times.draft * len(margins), self.times.reply(len(margins))
        self.tokens += accepted + 1
        self.seconds += draft_seconds + reply_seconds
        if not isinstance(planner, int):
            planner.observe(margins, accepted, self.off() * draft_seconds, self.off() * reply_seconds)

    def off(self) -> float:
        return self.chance.uniform(0.9, 1.1)

    def best_fixed(self) -> float:
        """Of all draft lengths, the target alone being 0."""
        return max(self.tokens_per_second(draft_len, 4000) for draft_len in range(MAX_DRAFT_LEN + 1))


def accepted_with(alpha: float) -> Callable[[random.Random], tuple[float | None, bool]]:
    return lambda chance: (None, chance.random() < alpha)


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
def test_without_leads_the_plan_comes_near_the_best_fixed_length(alpha: float, times: Times) -> None:
    def fixed(draft_len: int) -> float:
        return expected_tokens(alpha, draft_len) / (draft_len * times.draft + times.reply(draft_len))

    best = max(1 / times.target, *map(fixed, range(1, MAX_DRAFT_LEN + 1)))
    planned = (
        Simulation(times, accepted_with(alpha), seed).tokens_per_second(Planner(GATE, greedy=True)) for seed in range(4)
    )
    assert fmean(planned) > 0.93 * best


@pytest.mark.parametrize("times", [TIMES[0], TIMES[1], TIMES[3], Times(0.006, 0.050, link=0.100)])
def test_where_drafting_pays_leads_that_tell_make_the_plan_better_than_any_fixed_length(times: Times) -> None:
    def token(chance: random.Random) -> tuple[float, bool]:
        margin = chance.choice([0.05, *[1.5] * 6])
        return margin, chance.random() < (0.4 if margin < 1 else 0.98)

    simulation = Simulation(times, token)
    assert simulation.tokens_per_second(Planner(GATE, greedy=True)) > simulation.best_fixed()


def drafted(planner: Planner) -> int:
    """How many tokens the planner would draft."""
    margins: list[None] = []
    while planner.should_continue(margins):
        margins.append(None)
    return len(margins)


def test_the_plan_follows_a_link_that_becomes_slow() -> None:
    planner = Planner(GATE, greedy=False)
    planner.observe_decoded(8, 0.020, 0.140)
    for _ in range(50):
        planner.observe([None] * 4, 3, 0.040, 0.020)
    quick = drafted(planner)
    for _ in range(50):
        planner.observe([None] * 4, 3, 0.040, 0.200)
    assert quick < drafted(planner)


@pytest.mark.parametrize("improves", [True, False])
def test_the_way_changes_when_the_times_do(improves: bool) -> None:
    good, bad = Times(0.006, 0.040), Times(0.006, 0.040, link=0.300)
    planner = Planner(GATE, greedy=True)
    Simulation(bad if improves else good, accepted_with(0.6)).tokens_per_second(planner, tokens=3000)
    after = Simulation(good if improves else bad, accepted_with(0.6))
    after.tokens_per_second(planner, tokens=2000)
    assert after.tokens_per_second(planner, tokens=3000) > 0.93 * after.best_fixed()


def test_the_estimates_become_what_they_estimate() -> None:
    times = Times(0.010, 0.050, row=0.002, link=0.030)
    planner = Planner(GATE, greedy=True)
    Simulation(times, accepted_with(0.7)).tokens_per_second(planner)
    known = planner.times
    assert planner.alpha == pytest.approx(0.7, abs=0.1)
    assert known.draft_seconds == pytest.approx(times.draft, rel=0.05)
    assert known.target_seconds() == pytest.approx(times.target, rel=0.1)
    for draft_len in (2, 4, 8):
        expected = draft_len * times.draft + times.reply(draft_len)
        assert known.seconds(draft_len) == pytest.approx(expected, rel=0.1)


def test_the_first_request_shows_the_targets_pace_and_the_second_is_a_short_round() -> None:
    planner = Planner(GATE, greedy=True)
    planner.observe_opened(0.2)
    assert planner.decode_len() == TRIAL
    planner.observe_decoded(TRIAL, None, 0.1)
    assert planner.decode_len() == 0
    assert drafted(planner) == FIRST_DRAFT_LEN


@pytest.mark.parametrize(("round_seconds", "wait"), [(0.15, SHORTEST_WAIT), (1.0, round(9 / TRIALS_SHARE))])
def test_where_drafting_loses_it_is_tried_again_as_rarely_as_it_costs(round_seconds: float, wait: int) -> None:
    planner = Planner(GATE, greedy=True)
    planner.observe_decoded(TRIAL, 0.1, 0.1 * (TRIAL - 1))
    kv_caches: list[int] = []
    kv_cache = 0
    while len(kv_caches) < 40:
        count = planner.decode_len()
        if count:
            planner.observe_decoded(count, 0.1, 0.1 * (count - 1))
            kv_cache += count
        else:
            planner.observe([None], 0, 0.0, round_seconds)
            kv_caches.append(kv_cache)
            kv_cache = 0
    assert kv_caches[-2:] == [wait, wait]


@pytest.mark.parametrize("mode", [Mode.IDS, Mode.TOPK])
@pytest.mark.parametrize("run_ahead", [True, False])
def test_rounds_are_made_of_passes_of_one_token(mode: Mode, run_ahead: bool) -> None:
    """Where all stands as well, since the last drafted token is run while the Verdict is under way."""
    table = random_table(20, seed=1)
    station, model = Station(FakeTarget.make(table)), FakeDraftModel.make(table)
    transport, fates = MemoryTransport(station), cycle([1, 1, 0, 1, 2])
    client, _ = join(station, model, transport)
    transport.up = transport.down = lambda _: next(fates)
    settings = DraftSettings(mode, Sampling(), uplink_k=4, draft_len=4, run_ahead=run_ahead)
    passes = cast(FakeDraftModel, model).passes
    for prompt in ([3, 1, 4], [1, 5]):
        before = len(passes)
        answer = [token.token_id for token in client.open(settings, model, prompt).answer(60)]
        assert answer == target_alone(table, prompt, 60)
        rounds = passes[before + 1 :]
        assert set(rounds) == {1} if run_ahead else {1, 2}


def test_the_target_is_tried_more_rarely_where_drafting_is_faster() -> None:
    planner = Planner(GATE, greedy=True)
    planner.observe_decoded(TRIAL, 0.1, 0.1 * (TRIAL - 1))
    waits: list[int] = []
    tokens = 0
    while len(waits) < 20:
        if planner.decode_len():
            planner.observe_decoded(TRIAL, 0.1, 0.1 * (TRIAL - 1))
            waits.append(tokens)
            tokens = 0
        else:
            planner.observe([2.0] * 4, 4, 0.04, 0.11)
            tokens += 5
    lost = 0.3 * 5 / 0.15 - TRIAL
    assert waits[-1] > 60 * lost


def test_a_target_that_becomes_fast_is_found_out() -> None:
    slow, fast = Times(0.020, 0.080), Times(0.020, 0.010)
    planner = Planner(GATE, greedy=True)
    assert Simulation(slow, accepted_with(0.8)).tokens_per_second(planner, tokens=3000) > 1.2 / slow.target
    after = Simulation(fast, accepted_with(0.8))
    after.tokens_per_second(planner, tokens=2000)
    assert after.tokens_per_second(planner, tokens=3000) > 0.93 * after.best_fixed()


def test_a_round_of_no_tokens_teaches_nothing() -> None:
    planner = Planner(GATE, greedy=True)
    planner.observe_decoded(TRIAL, 0.1, 0.02)
    before = drafted(planner), planner.alpha
    planner.observe([], 0, 0.0, 100.0)
    assert (drafted(planner), planner.alpha) == before


def test_a_client_remembers_what_it_learnt_in_its_next_session() -> None:
    station, model = Station(FakeTarget.make(random_table(20, seed=1))), FakeDraftModel.make(random_table(20, seed=2))
    client, _ = join(station, model, MemoryTransport(station))
    settings = DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=None)
    begins_at = Planner(model.manifest.quality, greedy=True).alpha
    list(client.open(settings, model, [3, 1, 4]).answer(40))
    assert client.planner(settings, model.manifest).alpha < begins_at / 2  # the two models agree on nearly nothing
    warmer = replace(settings, mode=Mode.COUPLED, sampling=Sampling(1.0))
    assert client.planner(warmer, model.manifest).alpha == begins_at


def test_rounds_of_a_fixed_length_teach_the_plan_nothing() -> None:
    station, model = Station(FakeTarget.make(random_table(20, seed=1))), FakeDraftModel.make(random_table(20, seed=2))
    client, _ = join(station, model, MemoryTransport(station))
    planned = DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=None)
    before = client.planner(planned, model.manifest).alpha
    list(client.open(replace(planned, draft_len=2), model, [3, 1, 4]).answer(40))
    assert client.planner(planned, model.manifest).alpha == before


def test_a_device_whose_drafts_are_slow_lets_the_target_decode_and_tries_drafts_again() -> None:
    table = random_table(20, seed=1)
    station, model = Station(FakeTarget.make(table)), FakeDraftModel.make(random_table(20, seed=2))
    transport = MemoryTransport(station)
    client, _ = join(station, model, transport)
    ticks = iter(range(10**9))
    client.clock = lambda: float(next(ticks))  # every look at the clock a second later: a round takes two, a token one
    session = client.open(DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=None), model, [3, 1, 4])
    answer = [token.token_id for token in session.answer(600)]
    sent = [station.codec.decode(frame) for frame in transport.uplink]
    decodes = [message.count for message in sent if isinstance(message, Decode)]
    assert answer == target_alone(table, [3, 1, 4], 600)
    assert sum(decodes) > 500
    last_decode = max(place for place, message in enumerate(sent) if isinstance(message, Decode))
    assert any(isinstance(message, Draft) for message in sent[last_decode - 2 : last_decode])


@pytest.mark.parametrize("mode", [Mode.IDS, Mode.TARGET])
def test_an_answer_that_is_left_while_the_target_decodes_does_not_spoil_the_next(mode: Mode) -> None:
    table = random_table(20, seed=1)
    station, model = Station(FakeTarget.make(table)), FakeDraftModel.make(random_table(20, seed=2))
    client, _ = join(station, model, MemoryTransport(station))
    session = client.open(DraftSettings(mode, Sampling(), uplink_k=1, draft_len=None), model, [3, 1, 4])
    left = session.answer(200)
    next(left)  # the first tokens are the target's own
    del left
    session.extend([3, 1, 5])
    assert [token.token_id for token in session.answer(20)] == target_alone(table, [3, 1, 5], 20)


def test_close_calls_are_not_trusted_before_any_was_seen() -> None:
    def after(margin: float) -> int:
        planner = Planner(GATE, greedy=True)
        planner.observe_decoded(TRIAL, 0.1, 0.1)
        planner.observe([2.0] * 4, 4, 0.040, 0.060)
        margins = [margin] * 3
        while planner.should_continue(margins):
            margins.append(2.0)
        return len(margins)

    assert after(0.05) < after(0.2) < after(0.3)
