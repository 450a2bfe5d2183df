"""What a measured grid says as a whole: how well it was predicted, and how near ``auto`` comes to the best."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.grid.cells import Cell
from bench.setup.results import Row, Value, number, numbers
from protocol.messages import Mode

NEAR = 0.10
QUIET_LOAD = 2.0
"""Device and base station take turns and keep one core busy; a load average above says that others ran as well."""
SHOWN = ("case", "temperature", "round_trip_ms", "uplink_mbit", "tokens_per_second", "speedup")
PREDICTED = ("predicted_speedup", "failed")


@dataclass(frozen=True)
class AutoPace:
    """How ``auto`` compares with the best fixed draft length of a cell, which was measured over ``best_rounds``.

    0 is the target alone, which has no rounds.
    """

    cell: Cell
    best_draft_len: int
    best_rounds: int
    share: float


@dataclass(frozen=True)
class Miss:
    """A prediction that is further off than ``NEAR``, and what of it lies where: each predicted over measured, less 1.

    ``error`` is that of the speedup; multiplied (each plus 1) the others come to it. ``tokens`` of a round and the
    pace of rounds, whose ``seconds`` are measured over predicted, are None where nothing was drafted or no round
    predicted.
    """

    cell: Cell
    case: str
    error: float
    tokens: float | None
    seconds: float | None


def misses(rows: Sequence[Mapping[str, Value]]) -> list[Miss]:
    """Of all cells over a link."""
    found = []
    for row in predicted_rows(rows):
        error = number(row, "prediction_error")
        if abs(error) <= NEAR:
            continue
        tokens = seconds = None
        if row["predicted_tokens_per_round"] and row["tokens_per_round"]:
            tokens = number(row, "predicted_tokens_per_round") / number(row, "tokens_per_round")
            seconds = (1 + error) / tokens - 1
            tokens -= 1
        found.append(Miss(cell_of(row), str(row["case"]), error, tokens, seconds))
    return found


def shown(rows: Sequence[Mapping[str, Value]]) -> list[Row]:
    """The columns that a table of the grid has room for."""
    return [{name: row[name] for name in (*SHOWN, *PREDICTED)} for row in rows]


def predicted_rows(rows: Sequence[Mapping[str, Value]]) -> list[Mapping[str, Value]]:
    """The rows over a link whose speedup was measured and predicted, the target alone aside."""
    return [
        row
        for row in rows
        if row["round_trip_ms"] is not None and row["prediction_error"] is not None and row["mode"] != Mode.TARGET
    ]


def is_quiet(row: Mapping[str, Value]) -> bool:
    """Whether its cell had the machine to itself."""
    return number(row, "load_average") <= QUIET_LOAD


def share_near(rows: Sequence[Mapping[str, Value]]) -> float | None:
    """Of rows with a prediction, how many lie within ``NEAR`` of what was measured."""
    errors = [number(row, "prediction_error") for row in rows]
    return sum(abs(error) <= NEAR for error in errors) / len(errors) if errors else None


def cell_of(row: Mapping[str, Value]) -> Cell:
    """Of a row over a link."""
    return Cell(number(row, "temperature"), number(row, "round_trip_ms"), number(row, "uplink_mbit"))


def auto_paces(rows: Sequence[Mapping[str, Value]]) -> Iterator[AutoPace]:
    """Of every cell over a link in which nothing that counts failed."""
    by_cell: dict[Cell, list[Mapping[str, Value]]] = {}
    for row in rows:
        if row["round_trip_ms"] is not None:
            by_cell.setdefault(cell_of(row), []).append(row)
    for cell, of_cell in by_cell.items():
        own = [row for row in of_cell if row["mode"] in (Mode.IDS, Mode.COUPLED)]
        auto = [row for row in own if row["draft_len"] == "auto" and row["speedup"]]
        fixed = {
            int(number(row, "draft_len")): number(row, "speedup")
            for row in own
            if isinstance(row["draft_len"], int) and row["speedup"]
        }
        if auto and fixed:
            best, speedup = max({0: 1.0, **fixed}.items(), key=lambda one: one[1])
            rounds = next((int(numbers(row, "standing")[0]) for row in own if row["draft_len"] == best), 0)
            yield AutoPace(cell, best, rounds, number(auto[0], "speedup") / speedup)
