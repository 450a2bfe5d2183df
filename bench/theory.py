"""The paper's tables recomputed, its closed form against brute force, and its expectation against simulated rounds.

Formulas and numbers are those of arXiv:2509.04576. The search over draft lengths
is in ``common/round_model.py``; the closed form is here, because its Lambert
function needs SciPy, which the device does not have.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp, floor, log, pi

import numpy as np
import typer
from scipy.special import lambertw, wrightomega

from bench.setup.options import JsonOption, console, progress_bar
from bench.setup.results import Results, Row
from common.round_model import (
    SEARCH_LIMIT,
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
"""If two speedups differ by no more than this, both draft lengths are optimal."""
_LARGEST_EXPONENT = 700.0
ROUNDS = 100_000
SIMULATED_ALPHAS = (0.2, 0.4, 0.6, 0.8, 0.95)
SIMULATED_DRAFT_LENS = (1, 4, 8, 16)


def theory(json_file: JsonOption = None) -> None:
    """Recompute the paper's tables, check its closed form by brute force, and simulate rounds."""
    with progress_bar() as progress:
        task = progress.add_task("values of alpha", total=len(FINE_ALPHAS))
        found = disagreements(lambda: progress.advance(task))
    tables = [*draft_len_rows(), *cost_rows(), *round_trip_rows()]
    shown = Results({}, [*tables, grid_row(found), *simulated_rows()])
    shown.show(console)
    Results({}, [*shown.rows, *map_rows()]).write(json_file)
    if any(not one.is_tie for one in found):
        raise typer.Exit(1)


def closed_form_draft_len(alpha: float, cost: float) -> int:
    """γ* by the lower branch of the Lambert function (arXiv:2509.04576): the better integer next to γ₀, at least 1.

    γ₀ = (1/ln α)·[W₋₁(−e⁻¹·α^(1/L − 1)) + 1] − 1/L

    Args:
        alpha: α, in (0, 1).
        cost: L, in (0, 1).
    """
    best = (_lower_branch(1 - (1 / cost - 1) * log(alpha)) + 1) / log(alpha) - 1 / cost
    if best < 1:
        return 1
    below = floor(best)
    return max((below, below + 1), key=lambda draft_len: speedup(alpha, cost, draft_len))


def _lower_branch(exponent: float) -> float:
    """W₋₁(−e^−t) for an exponent t above 1; by Wright's omega function where e^−t underflows."""
    if exponent < _LARGEST_EXPONENT:
        return float(lambertw(-exp(-exponent), k=-1).real)
    return float(wrightomega(complex(-exponent, -pi)).real)


@dataclass(frozen=True)
class Disagreement:
    """A grid point where closed form and brute force differ; ``gap`` is the difference in speedup."""

    alpha: float
    cost: float
    closed_form: int
    brute_force: int
    gap: float

    @property
    def is_tie(self) -> bool:
        """Whether both are optimal."""
        return abs(self.gap) <= TIE


def disagreements(advance: Callable[[], object]) -> list[Disagreement]:
    """The points of the fine grid where the closed form differs from the search up to ``SEARCH_LIMIT``."""
    found = []
    for alpha in FINE_ALPHAS:
        for cost in FINE_COSTS:
            closed, brute = closed_form_draft_len(alpha, cost), optimal_draft_len(alpha, cost)
            if closed != brute:
                gap = speedup(alpha, cost, brute) - speedup(alpha, cost, closed)
                found.append(Disagreement(alpha, cost, closed, brute, gap))
        advance()
    return found


def draft_len_rows() -> Iterator[Row]:
    """The paper's table of γ* over α and L."""
    for alpha in TABLE_ALPHAS:
        for cost in TABLE_COSTS:
            yield {
                "case": "optimal draft length",
                "alpha": alpha,
                "cost": cost,
                "draft_len": optimal_draft_len(alpha, cost),
                "closed_form": closed_form_draft_len(alpha, cost),
                "speedup": speedup(alpha, cost, optimal_draft_len(alpha, cost)),
                "adaptive": adaptive_draft_len(alpha, cost),
            }


def cost_rows() -> Iterator[Row]:
    """L for the paper's values of K: 50 Mbit/s, FP16, a forward pass of 44.5 ms, drafting a token at 0.07 of that."""
    airtime = 16 * PAPER_VOCABULARY / (BITS_PER_SECOND * TARGET_SECONDS)
    for uplink_k in TABLE_UPLINK_K:
        cost = drafting_cost(DRAFT_COST, airtime, uplink_k, PAPER_VOCABULARY)
        yield {"case": "cost of a drafted token", "uplink_k": uplink_k, "cost": cost, "bytes": 2 * uplink_k}


def round_trip_rows(alpha: float = 0.6, uplink_k: int = 320) -> Iterator[Row]:
    """The best speedup where every round waits for a round trip, by the extended model."""
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


def grid_row(found: list[Disagreement]) -> Row:
    """How often closed form and brute force agree on the fine grid."""
    return {
        "case": "closed form and brute force",
        "points": len(FINE_ALPHAS) * len(FINE_COSTS),
        "max_draft_len": SEARCH_LIMIT,
        "differ": len(found),
        "differ_beyond_ties": sum(not one.is_tie for one in found),
        "largest_gap": max((one.gap for one in found), default=0.0),
    }


def simulated_rows(seed: int = 1) -> Iterator[Row]:
    """Tokens per simulated round and E(γ); ``standard_errors`` is their difference in standard errors of the mean."""
    rng = np.random.default_rng(seed)
    for alpha in SIMULATED_ALPHAS:
        for draft_len in SIMULATED_DRAFT_LENS:
            accepted = rng.random((ROUNDS, draft_len)) < alpha
            tokens = 1 + np.cumprod(accepted, axis=1).sum(axis=1)
            expected = expected_tokens(alpha, draft_len)
            yield {
                "case": "simulated rounds",
                "alpha": alpha,
                "draft_len": draft_len,
                "tokens_per_round": float(tokens.mean()),
                "expected_tokens": expected,
                "standard_errors": float((tokens.mean() - expected) / (tokens.std() / ROUNDS**0.5)),
            }


def map_rows() -> Iterator[Row]:
    """γ* by the adaptive rule on a coarse grid, for the map of the report."""
    for alpha in FINE_ALPHAS[4::5]:
        for cost in FINE_COSTS[3::4]:
            yield {"case": "map", "alpha": alpha, "cost": cost, "adaptive": adaptive_draft_len(alpha, cost)}
