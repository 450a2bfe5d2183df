"""The paper's tables recomputed, its closed form against brute force, and its expectation against simulated rounds.

Formulas and numbers are of arXiv:2509.04576; the integer search that a device
uses stands in ``device/planner.py``, the closed form with the Lambert function
here, because a device has no SciPy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp, floor, log, pi

import numpy as np
from scipy.special import lambertw, wrightomega

from bench.setup.results import Value
from device.round_model import (
    LONGEST,
    Direction,
    RoundTimes,
    adaptive_draft_len,
    drafting_cost,
    expected_tokens,
    optimal_draft_len,
    speedup,
)

TABLE_ALPHAS = (0.4, 0.6, 0.8)
TABLE_COSTS = (0.01, 0.1, 0.2, 0.4, 0.6)
TABLE_UPLINK_K = (3, 32, 320, 3200, 32_000)
TABLE_ROUND_TRIPS = (0.0, 0.010, 0.020, 0.050, 0.100)
PAPER_VOCABULARY = 32_000
TARGET_SECONDS = 44.5e-3
DRAFT_COST = 0.07
BITS_PER_SECOND = 50e6
FINE_ALPHAS = tuple(float(value) for value in np.arange(1, 100) / 100)
FINE_COSTS = tuple(float(value) for value in np.arange(1, 200) / 200)
TIE = 1e-9
"""Speedups this near to each other are a tie: either draft length is best."""
_LARGEST_EXPONENT = 700.0
ROUNDS = 100_000
SIMULATED_ALPHAS = (0.2, 0.4, 0.6, 0.8, 0.95)
SIMULATED_DRAFT_LENS = (1, 4, 8, 16)


def closed_form_draft_len(alpha: float, cost: float) -> int:
    """γ* by the lower branch of the Lambert function (arXiv:2509.04576): the better integer beside γ₀, at least 1.

    γ₀ = (1/ln α)·[W₋₁(−e⁻¹·α^(1/L − 1)) + 1] − 1/L

    Args:
        alpha: α, above 0 and below 1.
        cost: L, above 0 and below 1.
    """
    best = (_lower_branch(1 - (1 / cost - 1) * log(alpha)) + 1) / log(alpha) - 1 / cost
    if best < 1:
        return 1
    below = floor(best)
    return max((below, below + 1), key=lambda draft_len: speedup(alpha, cost, draft_len))


def _lower_branch(exponent: float) -> float:
    """W₋₁(−e^−t) of the exponent t, above 1; Wright's function takes over where e^−t is no float."""
    if exponent < _LARGEST_EXPONENT:
        return float(lambertw(-exp(-exponent), k=-1).real)
    return float(wrightomega(complex(-exponent, -pi)).real)


@dataclass(frozen=True)
class Disagreement:
    """A point of the grid where closed form and brute force differ, and by how much in speedup."""

    alpha: float
    cost: float
    closed_form: int
    brute_force: int
    gap: float

    @property
    def is_tie(self) -> bool:
        """Whether both are best."""
        return abs(self.gap) <= TIE


def disagreements(advance: Callable[[], object]) -> list[Disagreement]:
    """Where the closed form and the search over all draft lengths to ``LONGEST`` differ, on the fine grid."""
    found = []
    for alpha in FINE_ALPHAS:
        for cost in FINE_COSTS:
            closed, brute = closed_form_draft_len(alpha, cost), optimal_draft_len(alpha, cost)
            if closed != brute:
                gap = speedup(alpha, cost, brute) - speedup(alpha, cost, closed)
                found.append(Disagreement(alpha, cost, closed, brute, gap))
        advance()
    return found


def draft_len_rows() -> Iterator[dict[str, Value]]:
    """γ* for α and L."""
    for alpha in TABLE_ALPHAS:
        for cost in TABLE_COSTS:
            yield {
                "case": "best draft length",
                "alpha": alpha,
                "cost": cost,
                "draft_len": optimal_draft_len(alpha, cost),
                "closed_form": closed_form_draft_len(alpha, cost),
                "speedup": speedup(alpha, cost, optimal_draft_len(alpha, cost)),
                "adaptive": adaptive_draft_len(alpha, cost),
            }


def cost_rows() -> Iterator[dict[str, Value]]:
    """L for the paper's values of K: 50 Mbit/s, FP16, a pass of 44.5 ms, drafting a token .07 of that."""
    airtime = 16 * PAPER_VOCABULARY / (BITS_PER_SECOND * TARGET_SECONDS)
    for uplink_k in TABLE_UPLINK_K:
        cost = drafting_cost(DRAFT_COST, airtime, uplink_k, PAPER_VOCABULARY)
        yield {"case": "cost of a drafted token", "uplink_k": uplink_k, "cost": cost, "bytes": 2 * uplink_k}


def round_trip_rows(alpha: float = 0.6, uplink_k: int = 320) -> Iterator[dict[str, Value]]:
    """The best speedup when each round waits for a round trip, with the extended model."""
    uplink = Direction(token_bytes=2 * uplink_k, bytes_per_second=BITS_PER_SECOND / 8)
    for round_trip in TABLE_ROUND_TRIPS:
        times = RoundTimes(DRAFT_COST * TARGET_SECONDS, lambda _: TARGET_SECONDS, round_trip, uplink)
        best = times.best_draft_len(alpha, range(1, 65))
        yield {
            "case": "round trip",
            "alpha": alpha,
            "uplink_k": uplink_k,
            "round_trip_milliseconds": 1e3 * round_trip,
            "draft_len": best,
            "speedup": times.speedup(alpha, best),
        }


def grid_row(found: list[Disagreement]) -> dict[str, Value]:
    """How often closed form and brute force agree on the fine grid."""
    return {
        "case": "closed form against brute force",
        "points": len(FINE_ALPHAS) * len(FINE_COSTS),
        "longest": LONGEST,
        "differ": len(found),
        "differ_without_tie": sum(not one.is_tie for one in found),
        "largest_gap": max((one.gap for one in found), default=0.0),
    }


def simulated_rows(seed: int = 1) -> Iterator[dict[str, Value]]:
    """Tokens of simulated rounds against E(γ); ``deviations`` is their distance in standard errors of the mean."""
    chance = np.random.default_rng(seed)
    for alpha in SIMULATED_ALPHAS:
        for draft_len in SIMULATED_DRAFT_LENS:
            stands = chance.random((ROUNDS, draft_len)) < alpha
            tokens = 1 + np.cumprod(stands, axis=1).sum(axis=1)
            expected = expected_tokens(alpha, draft_len)
            yield {
                "case": "simulated rounds",
                "alpha": alpha,
                "draft_len": draft_len,
                "tokens": float(tokens.mean()),
                "expected_tokens": expected,
                "deviations": float((tokens.mean() - expected) / (tokens.std() / ROUNDS**0.5)),
            }


def map_rows() -> Iterator[dict[str, Value]]:
    """γ* by the adaptive rule on a coarse grid: what the map of the report is drawn from."""
    for alpha in FINE_ALPHAS[4::5]:
        for cost in FINE_COSTS[3::4]:
            yield {"case": "map", "alpha": alpha, "cost": cost, "adaptive": adaptive_draft_len(alpha, cost)}
