"""The planner's formulas against simulated rounds, and its live plan against the best one in hindsight."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from device.client import DraftSettings
from device.planner import MAX_DRAFT_LEN, DraftLenPlanner, expected_tokens, optimal_draft_len, speedup
from protocol.bundle import GateFigures
from protocol.messages import Mode, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, random_table
from tests.link_pair import MemoryTransport, Station, join

GATE = GateFigures(argmax_agreement=0.9, overlap=0.8, topk_acceptance=0.7, coupled_acceptance=0.8, positions=100)
ALPHAS = (0.0, 0.3, 0.7, 0.95, 1.0)


def accepted_in(chance: random.Random, alpha: float, draft_len: int) -> int:
    """Accepted tokens of a simulated round."""
    return next((place for place in range(draft_len) if chance.random() >= alpha), draft_len)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_expected_tokens_are_those_of_simulated_rounds(alpha: float) -> None:
    chance = random.Random(1)  # noqa: S311
    rounds = 20_000
    mean = 1 + sum(accepted_in(chance, alpha, 6) for _ in range(rounds)) / rounds
    assert expected_tokens(alpha, 6) == pytest.approx(mean, abs=0.06)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("cost", [0.01, 0.1, 0.5, 2.0])
def test_no_draft_length_beats_the_optimal_one(alpha: float, cost: float) -> None:
    best = speedup(alpha, cost, optimal_draft_len(alpha, cost))
    assert all(speedup(alpha, cost, draft_len) <= best for draft_len in range(1, MAX_DRAFT_LEN + 1))


@dataclass
class Simulation:
    """Rounds with times in seconds: to draft a token, from a Draft to its Verdict, and more of that for each token.

    ``token`` draws a drafted token: its lead, or None, and whether it would stand.
    """

    draft: float
    reply: float
    row: float
    token: Callable[[random.Random], tuple[float | None, bool]]

    def tokens_per_second(self, planner: DraftLenPlanner | int, rounds: int = 1500) -> float:
        """As ``planner`` decides, or with a fixed draft length; measured times are off by up to a tenth."""
        chance = random.Random(2)  # noqa: S311
        tokens = seconds = 0.0
        for _ in range(rounds):
            leads: list[float | None] = []
            stands: list[bool] = []
            while len(leads) < planner if isinstance(planner, int) else planner.goes_on(leads):
                lead, stand = self.token(chance)
                leads.append(lead)
                stands.append(stand)
            accepted = [*stands, False].index(False)
            draft_seconds, reply_seconds = self.draft * len(leads), self.reply + self.row * len(leads)
            tokens += accepted + 1
            seconds += draft_seconds + reply_seconds
            if not isinstance(planner, int):
                noise = chance.uniform(0.9, 1.1)
                planner.observe(leads, accepted, noise * draft_seconds, noise * reply_seconds)
        return tokens / seconds

    def best_fixed(self) -> float:
        return max(map(self.tokens_per_second, range(1, MAX_DRAFT_LEN + 1)))


TIMES = [(0.006, 0.021, 0.0004), (0.010, 0.040, 0.002), (0.006, 0.130, 0.0004), (0.030, 0.020, 0.001)]


@pytest.mark.parametrize("alpha", [0.5, 0.8, 0.96])
@pytest.mark.parametrize("times", TIMES)
def test_without_leads_the_plan_comes_near_the_best_fixed_length(
    alpha: float, times: tuple[float, float, float]
) -> None:
    simulation = Simulation(*times, token=lambda chance: (None, chance.random() < alpha))
    assert simulation.tokens_per_second(DraftLenPlanner(GATE, greedy=True)) > 0.95 * simulation.best_fixed()


@pytest.mark.parametrize("times", TIMES[:3])  # in the last, where drafting does not pay, one token is best anyway
def test_leads_that_tell_make_the_plan_better_than_any_fixed_length(times: tuple[float, float, float]) -> None:
    def token(chance: random.Random) -> tuple[float, bool]:
        lead = chance.choice([0.05, *[1.5] * 6])
        return lead, chance.random() < (0.4 if lead < 1 else 0.98)

    simulation = Simulation(*times, token)
    assert simulation.tokens_per_second(DraftLenPlanner(GATE, greedy=True)) > simulation.best_fixed()


def drafted(planner: DraftLenPlanner) -> int:
    """How many tokens the planner would draft."""
    leads: list[None] = []
    while planner.goes_on(leads):
        leads.append(None)
    return len(leads)


def test_the_plan_follows_a_link_that_becomes_slow() -> None:
    planner = DraftLenPlanner(GATE, greedy=False)
    for _ in range(50):
        planner.observe([None] * 4, 3, 0.040, 0.020)
    quick = drafted(planner)
    for _ in range(50):
        planner.observe([None] * 4, 3, 0.040, 0.200)
    assert quick < drafted(planner)


def test_a_round_of_no_tokens_teaches_nothing() -> None:
    planner = DraftLenPlanner(GATE, greedy=True)
    before = drafted(planner), planner.alpha
    planner.observe([], 0, 0.0, 100.0)
    assert (drafted(planner), planner.alpha) == before


def test_a_client_remembers_what_it_learnt_in_its_next_session() -> None:
    station, model = Station(FakeTarget.make(random_table(20, seed=1))), FakeDraftModel.make(random_table(20, seed=2))
    client, _ = join(station, model, MemoryTransport(station))
    settings = DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=None)
    begins_at = DraftLenPlanner(model.manifest.gate, greedy=True).alpha
    list(client.open(settings, model, [3, 1, 4]).answer(40))
    assert client.planner(settings, model.manifest).alpha < begins_at / 2  # the two models agree on nearly nothing
    warmer = replace(settings, mode=Mode.COUPLED, sampling=Sampling(1.0))
    assert client.planner(warmer, model.manifest).alpha == begins_at
