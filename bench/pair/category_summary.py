"""Summary of measured categories: the columns for a terminal, and medians over the categories."""

from collections.abc import Mapping, Sequence
from statistics import median

from bench.grid.cells import TARGET
from bench.setup.results import Row, Value, number

_DISPLAYED = (
    "category",
    "temperature",
    "case",
    "tokens_per_second",
    "acceptance_rate",
    "acceptance_length",
    "speedup",
    "speedup_interval",
    "over_colocated",
    "over_round_model",
    "failed",
)


def display_rows(rows: Sequence[Mapping[str, Value]]) -> list[Row]:
    """The columns that fit into a terminal."""
    return [{name: row[name] for name in _DISPLAYED} for row in rows]


def summary_rows(rows: Sequence[Mapping[str, Value]]) -> list[Row]:
    """For each temperature and case the median over the categories, and the category where the speedup is least."""
    summary: list[Row] = []
    for temperature, case in dict.fromkeys((number(row, "temperature"), str(row["case"])) for row in rows):
        of_case = [row for row in rows if (row["temperature"], row["case"]) == (temperature, case)]
        timed = [row for row in of_case if row["speedup"] is not None]
        if case == TARGET.name or not timed:
            continue
        least = min(timed, key=lambda row: number(row, "speedup"))
        summary.append(
            {
                "case": case,
                "temperature": temperature,
                "categories": len(timed),
                "median_speedup": median(number(row, "speedup") for row in timed),
                "least_speedup": least["speedup"],
                "in_category": least["category"],
                "median_over_colocated": _median(timed, "over_colocated"),
                "median_over_round_model": _median(timed, "over_round_model"),
            }
        )
    return summary


def _median(rows: Sequence[Mapping[str, Value]], name: str) -> float | None:
    values = [number(row, name) for row in rows if row[name] is not None]
    return median(values) if values else None
