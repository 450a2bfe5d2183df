"""Summary of a measured grid: the accuracy of its predictions, and ``auto`` against the best fixed draft length."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.grid.cells import Cell
from bench.setup.results import Row, Value, number, numbers
from protocol.messages import Mode

TOLERANCE = 0.10
"""Relative error up to which a prediction counts as accurate."""
MAX_QUIET_LOAD = 2.0
"""Device and base station alternate and keep one core busy; a higher load average means that other programs ran."""
_DISPLAYED = (
    "case",
    "temperature",
    "round_trip_ms",
    "uplink_mbit",
    "tokens_per_second",
    "speedup",
    "predicted_speedup",
    "failed",
)


@dataclass(frozen=True)
class AutoComparison:
    """``auto`` against the best fixed draft length of a cell; ``share`` is its throughput over the best.

    ``best_draft_len`` 0 is the target alone; ``best_rounds`` is the number of measured rounds of the best.
    """

    cell: Cell
    best_draft_len: int
    best_rounds: int
    share: float


@dataclass(frozen=True)
class Outlier:
    """A prediction with an error beyond ``TOLERANCE``, and its two factors; each is predicted over measured, minus 1.

    ``error`` is that of the speedup. ``tokens_error`` is that of tokens per round, ``rate_error`` that of rounds per
    second; (1 + tokens_error)·(1 + rate_error) = 1 + error. Both are None where nothing was drafted or no round was
    predicted.
    """

    cell: Cell
    case: str
    error: float
    tokens_error: float | None
    rate_error: float | None


def outliers(rows: Sequence[Mapping[str, Value]]) -> list[Outlier]:
    """The outliers of all cells over a link."""
    found = []
    for row in predicted_rows(rows):
        error = number(row, "prediction_error")
        if abs(error) <= TOLERANCE:
            continue
        tokens_error = rate_error = None
        if row["predicted_tokens_per_round"] and row["tokens_per_round"]:
            factor = number(row, "predicted_tokens_per_round") / number(row, "tokens_per_round")
            tokens_error, rate_error = factor - 1, (1 + error) / factor - 1
        found.append(Outlier(cell_of(row), str(row["case"]), error, tokens_error, rate_error))
    return found


def display_rows(rows: Sequence[Mapping[str, Value]]) -> list[Row]:
    """The columns that fit into a terminal."""
    return [{name: row[name] for name in _DISPLAYED} for row in rows]


def predicted_rows(rows: Sequence[Mapping[str, Value]]) -> list[Mapping[str, Value]]:
    """The rows over a link with a measured and a predicted speedup, except the target alone."""
    return [
        row
        for row in rows
        if row["round_trip_ms"] is not None and row["prediction_error"] is not None and row["mode"] != Mode.TARGET
    ]


def is_quiet(row: Mapping[str, Value]) -> bool:
    """Whether the machine was otherwise idle when the row's cell was measured."""
    return number(row, "load_average") <= MAX_QUIET_LOAD


def share_within_tolerance(rows: Sequence[Mapping[str, Value]]) -> float | None:
    """The share of predictions with an error of at most ``TOLERANCE``; None without rows."""
    errors = [number(row, "prediction_error") for row in rows]
    return sum(abs(error) <= TOLERANCE for error in errors) / len(errors) if errors else None


def accuracy_text(predicted: Sequence[Mapping[str, Value]]) -> str:
    """The share of predictions within ``TOLERANCE``, and of the cells where all are, in one sentence.

    Args:
        predicted: at least one row, as of ``predicted_rows``.
    """
    accurate: dict[Cell, bool] = {}
    for row in predicted:
        cell = cell_of(row)
        accurate[cell] = accurate.get(cell, True) and abs(number(row, "prediction_error")) <= TOLERANCE
    share = share_within_tolerance(predicted) or 0.0
    return (
        f"{100 * share:.0f} % of {len(predicted)} predictions are within {100 * TOLERANCE:.0f} % of the measured "
        f"speedup, all of a cell's in {sum(accurate.values())} of {len(accurate)} cells."
    )


def cell_of(row: Mapping[str, Value]) -> Cell:
    """The cell of a row over a link."""
    return Cell(number(row, "temperature"), number(row, "round_trip_ms"), number(row, "uplink_mbit"))


def compare_auto(rows: Sequence[Mapping[str, Value]]) -> Iterator[AutoComparison]:
    """The comparison for every cell over a link where ``auto`` and a fixed draft length were measured."""
    by_cell: dict[Cell, list[Mapping[str, Value]]] = {}
    for row in rows:
        if row["round_trip_ms"] is not None and row["mode"] in (Mode.IDS, Mode.COUPLED):
            by_cell.setdefault(cell_of(row), []).append(row)
    for cell, of_cell in by_cell.items():
        auto = [row for row in of_cell if row["draft_len"] == "auto" and row["speedup"]]
        fixed = {
            int(number(row, "draft_len")): number(row, "speedup")
            for row in of_cell
            if isinstance(row["draft_len"], int) and row["speedup"]
        }
        if auto and fixed:
            best, speedup = max({0: 1.0, **fixed}.items(), key=lambda one: one[1])
            rounds = next((numbers(row, "accepted_at_least")[0] for row in of_cell if row["draft_len"] == best), 0)
            yield AutoComparison(cell, best, rounds, number(auto[0], "speedup") / speedup)
