"""The round model against the paper's tables and simulated rounds; invalid arguments are refused."""

import random
from collections.abc import Callable
from math import inf, nan

import pytest

from common.round_model import (
    SEARCH_LIMIT,
    Acceptance,
    Direction,
    RoundTimes,
    adaptive_draft_len,
    drafting_cost,
    expected_tokens,
    optimal_draft_len,
    run_tokens,
    speedup,
)
from protocol.errors import SettingsError

ALPHAS: list[Acceptance] = [0.0, 0.3, 0.7, 0.95, 1.0, [0.9, 0.5, 0.2], [0.2, 1.0]]
OPTIMAL_LENGTHS = {  # α: γ* at each of COSTS
    0.4: (4, 2, 1, 1, 1),
    0.6: (7, 3, 2, 1, 1),
    0.8: (14, 6, 4, 2, 1),
}
COSTS = (0.01, 0.1, 0.2, 0.4, 0.6)


def simulate_round(rng: random.Random, alpha: Acceptance, draft_len: int) -> int:
    """How many tokens a simulated round accepts."""
    alphas = [alpha] * draft_len if isinstance(alpha, float) else [*alpha, *[alpha[-1]] * draft_len][:draft_len]
    return next((index for index, probability in enumerate(alphas) if rng.random() >= probability), draft_len)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_expected_tokens_equal_the_mean_of_simulated_rounds(alpha: Acceptance) -> None:
    rng = random.Random(1)  # noqa: S311
    rounds = 20_000
    mean = 1 + sum(simulate_round(rng, alpha, 6) for _ in range(rounds)) / rounds
    assert expected_tokens(alpha, 6) == pytest.approx(mean, abs=0.06)


@pytest.mark.parametrize("alpha", [0.3, 0.7, 0.95])
def test_expected_tokens_equal_the_papers_closed_form(alpha: float) -> None:
    for draft_len in range(9):
        assert expected_tokens(alpha, draft_len) == pytest.approx((1 - alpha ** (draft_len + 1)) / (1 - alpha))


@pytest.mark.parametrize("alpha", OPTIMAL_LENGTHS)
def test_optimal_draft_lengths_equal_the_papers_table(alpha: float) -> None:
    assert tuple(optimal_draft_len(alpha, cost) for cost in COSTS) == OPTIMAL_LENGTHS[alpha]


def test_adaptive_rule_drafts_only_where_the_speedup_exceeds_one() -> None:
    assert speedup(0.4, 0.4, 1) == pytest.approx(1)
    assert speedup(0.4, 0.6, 1) == pytest.approx(0.875)
    assert adaptive_draft_len(0.4, 0.6) == 0
    assert adaptive_draft_len(0.8, 0.6) == optimal_draft_len(0.8, 0.6) == 1
    assert adaptive_draft_len(0.4, 0.39) == 1


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("cost", [0.0, 0.01, 0.1, 0.5, 2.0])
def test_optimal_draft_length_has_the_largest_speedup(alpha: Acceptance, cost: float) -> None:
    best = speedup(alpha, cost, optimal_draft_len(alpha, cost))
    assert all(speedup(alpha, cost, draft_len) <= best for draft_len in range(1, SEARCH_LIMIT + 1, 7))


def test_drafting_costs_equal_the_papers() -> None:
    airtime = 16 * 32_000 / (50e6 * 44.5e-3)
    costs = [drafting_cost(0.07, airtime, uplink_k, 32_000) for uplink_k in (3, 32, 320, 3200, 32_000)]
    assert [round(cost, 4) for cost in costs] == [0.07, 0.0702, 0.0723, 0.093, 0.3001]


def papers_times(round_trip_seconds: float, uplink_k: int = 320) -> RoundTimes:
    """The paper's system: a forward pass takes 44.5 ms for any draft length; FP16 probabilities at 50 Mbit/s."""
    uplink = Direction(token_bytes=2 * uplink_k, bytes_per_second=50e6 / 8)
    return RoundTimes(0.07 * 44.5e-3, lambda _: 44.5e-3, round_trip_seconds, uplink)


def test_round_model_without_round_trip_and_downlink_equals_the_papers() -> None:
    cost = drafting_cost(0.07, 16 * 32_000 / (50e6 * 44.5e-3), 320, 32_000)
    for draft_len in range(1, 9):
        assert papers_times(0).speedup(0.6, draft_len) == pytest.approx(speedup(0.6, cost, draft_len))


def test_speedup_falls_as_the_round_trip_grows() -> None:
    times = [papers_times(milliseconds / 1e3) for milliseconds in (0, 10, 20, 50, 100)]
    best = [max(round_times.speedup(0.6, draft_len) for draft_len in range(1, 65)) for round_times in times]
    assert [round(value, 2) for value in best] == [1.79, 1.52, 1.33, 0.96, 0.66]
    assert [round_times.best_draft_len(0.6, range(65)) for round_times in times] == [4, 4, 4, 0, 0]


def test_round_time_is_the_sum_of_its_parts() -> None:
    up, down = Direction(20, 5, 1000), Direction(10, 1, 100)
    times = RoundTimes(0.01, lambda draft_len: 0.2 + 0.02 * draft_len, 0.05, up, down)
    assert times.seconds(4) == pytest.approx(0.04 + 0.28 + 0.05 + 0.04 + 0.14)
    assert times.target_seconds() == pytest.approx(0.2)
    assert RoundTimes(0.0, lambda _: 0.02, downlink=down).target_seconds() == pytest.approx(0.1)


def test_the_best_length_of_runs_has_the_shortest_run() -> None:
    times = RoundTimes(0.01, lambda draft_len: 0.045 + 0.003 * draft_len, 0.15)
    for alpha, best in ((0.5, 1), (0.75, 3), (0.97, 6)):
        lengths = range(1, 33)
        assert times.best_run_len(alpha, lengths, 3) == best
        assert best == min(lengths, key=lambda draft_len: times.run_seconds(alpha, draft_len, 3))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 0.99])
def test_without_drafts_ahead_a_run_is_as_fast_as_its_rounds(alpha: float) -> None:
    times = papers_times(0.05)
    for draft_len in (1, 4, 16):
        rate = expected_tokens(alpha, draft_len) / times.seconds(draft_len)
        assert run_tokens(alpha) / times.run_seconds(alpha, draft_len, 0) == pytest.approx(rate, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("alpha", lambda: expected_tokens(1.1, 3)),
        ("alpha", lambda: optimal_draft_len(-0.1, 0.5)),
        ("alpha", lambda: speedup([0.5, nan], 0.5, 3)),
        ("alpha", lambda: expected_tokens([], 3)),
        ("draft_len", lambda: expected_tokens(0.5, -1)),
        ("cost", lambda: speedup(0.5, -0.1, 3)),
        ("cost", lambda: optimal_draft_len(0.5, nan)),
        ("draft_cost", lambda: drafting_cost(-1, 0.2, 3, 10)),
        ("full_airtime", lambda: drafting_cost(0.1, inf, 3, 10)),
        ("uplink_k", lambda: drafting_cost(0.1, 0.2, 11, 10)),
        ("uplink_k", lambda: drafting_cost(0.1, 0.2, 0, 10)),
        ("bytes_per_second", lambda: Direction(1, 1, -5)),
        ("bytes_per_second", lambda: Direction(1, 1, 0)),
        ("token_bytes", lambda: Direction(1, -1)),
        ("round_bytes", lambda: Direction(-1, 1)),
        ("draft_seconds", lambda: RoundTimes(-1, lambda _: 1.0)),
        ("round_trip_seconds", lambda: RoundTimes(1, lambda _: 1.0, -1)),
    ],
)
def test_invalid_argument_is_refused_by_name(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(SettingsError, match=f"^{name} is ") as caught:
        call()
    assert caught.value.name == name
