"""The section of docs/results.md on a measured grid: its cells, the accuracy of predictions, and ``auto``."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.grid.cells import COLOCATED, TARGET, Cell
from bench.grid.summary import (
    MAX_QUIET_LOAD,
    TOLERANCE,
    Outlier,
    accuracy_text,
    cell_of,
    compare_auto,
    is_quiet,
    outliers,
    predicted_rows,
    share_within_tolerance,
)
from bench.report.markdown import Rows, lines, table
from bench.report.plots import plot_speedup
from bench.setup.results import Results, Value, format_value, number

AUTO_GOAL = 0.93
"""Share of the best fixed draft length's throughput that ``auto`` should reach."""
_LOOPBACK_LEFT_OUT = (
    "rounds",
    "round_trip_ms",
    "uplink_mbit",
    "mode",
    "prediction_error",
    "predicted_speedup",
    "predicted_tokens_per_round",
    "ttft_milliseconds",
)
_OUTLIER_HEAD = ("cell", "case", "speedup", "tokens per round", "rounds per second")


def grid_parts(results: Results, plots: Path, wanted: Sequence[Cell], prefix: str = "") -> Iterator[str]:
    """Paragraphs and tables.

    Args:
        results: of the grid.
        plots: the folder that plots are written into.
        wanted: the cells over a link that the grid has when it is complete.
        prefix: of the names of the plots.
    """
    yield (
        "Speedup: tokens per second over those of the target alone on the same link, after the first tokens of each "
        "answer. In parentheses the prediction of the extended model, made from the loopback figures and scaled by the "
        "speed of the target alone in the cell. Below 1, drafting is slower. `full vocabulary` uses the draft length "
        "of 1, 2 and 4 that is predicted best. `colocated` runs the draft model on the base station's core; it needs "
        "no link and is measured once per temperature."
    )
    for temperature in sorted({number(row, "temperature") for row in results.rows}):
        rows = [row for row in results.rows if row["temperature"] == temperature]
        yield f"### Temperature {temperature:g}\n\n{_cell_table(rows)}"
        if any(row["round_trip_ms"] is not None for row in rows):
            name = f"{prefix}speedup_{temperature:g}.svg"
            plot_speedup(results, temperature, plots / name)
            yield f"![speedup over the round trip](plots/{name})"
    yield from _coverage(results.rows, wanted)
    yield from _auto(results.rows)
    yield from _accuracy(results.rows)
    loopback = [row for row in results.rows if row["round_trip_ms"] is None]
    yield f"### Loopback, the basis of the predictions\n\n{table(loopback, leave_out=_LOOPBACK_LEFT_OUT)}"


def _cell_table(rows: Rows) -> str:
    """A line per cell and a column per case; the colocated case is the same in every line."""
    linked = [row for row in rows if row["round_trip_ms"] is not None]
    colocated = next((row for row in rows if row["case"] == COLOCATED), None)
    if not linked:
        return "No cell was measured."
    names = [name for name in dict.fromkeys(str(row["case"]) for row in linked) if name != TARGET.name]
    links = dict.fromkeys((number(row, "round_trip_ms"), number(row, "uplink_mbit")) for row in linked)
    cell_lines = [["round trip, ms", "uplink, Mbit/s", "load average", "target alone, tokens/s", *names, COLOCATED]]
    for round_trip, rate in links:
        of_cell = {
            str(row["case"]): row for row in linked if (row["round_trip_ms"], row["uplink_mbit"]) == (round_trip, rate)
        }
        alone = [format_value(of_cell[TARGET.name][name]) for name in ("load_average", "tokens_per_second")]
        figures = [_speedup_text(of_cell.get(name)) for name in names]
        cell_lines.append([f"{round_trip:g}", f"{rate:g}", *alone, *figures, _speedup_text(colocated)])
    return lines(cell_lines)


def _speedup_text(row: Mapping[str, Value] | None) -> str:
    if row is None:
        return "not measured"
    if row["failed"] is not None or row["speedup"] is None:
        return f"failed: {row['failed'] or 'no round was timed'}"
    predicted = row["predicted_speedup"]
    return f"{number(row, 'speedup'):.2f}" + (f" ({number(row, 'predicted_speedup'):.2f})" if predicted else "")


def _coverage(rows: Rows, wanted: Sequence[Cell]) -> Iterator[str]:
    """Which cells were measured, and how many of them on a busy machine."""
    missing = [cell for cell in wanted if not any(cell.has(row) for row in rows)]
    yield f"### Summary\n\n{len(wanted) - len(missing)} of the {len(wanted)} cells of the grid were measured."
    if missing:
        yield f"Not measured: {'; '.join(map(_cell_name, missing))}."
    busy = {cell_of(row) for row in rows if row["round_trip_ms"] is not None and not is_quiet(row)}
    if busy:
        yield (
            f"The load average was above {MAX_QUIET_LOAD:g} in {len(busy)} of the cells: other programs ran on the two "
            "cores and distort the figures of these cells."
        )


def _auto(rows: Rows) -> Iterator[str]:
    """``auto`` against the best fixed draft length of each cell."""
    comparisons = list(compare_auto(rows))
    below = [one for one in comparisons if one.share < AUTO_GOAL]
    if comparisons:
        yield (
            f"`--draft-len auto` reaches {AUTO_GOAL:g} of the best fixed draft length, counting the target alone as "
            f"draft length 0, in {len(comparisons) - len(below)} of {len(comparisons)} cells; the smallest share is "
            f"{min(one.share for one in comparisons):.2f}."
        )
    if below:
        below_lines = [
            [_cell_name(one.cell), str(one.best_draft_len), str(one.best_rounds or "–"), f"{one.share:.2f}"]
            for one in below
        ]
        head = ["cell", "best draft length", "its rounds", "share"]
        yield "Cells below that:\n\n" + lines([head, *below_lines])
        yield (
            "A fixed draft length decodes the same tokens in every cell of a temperature, so a few rounds with "
            "unusually high or low acceptance affect all cells alike."
        )


def _accuracy(rows: Rows) -> Iterator[str]:
    """The errors of the predictions."""
    predicted = predicted_rows(rows)
    if predicted:
        yield f"{accuracy_text(predicted)}{_share_of_quiet_cells(predicted)}\n\n{_errors_by_case(predicted)}"
        slowest, fastest = _widest_drift(rows)
        yield (
            f"The machine's speed drifts: the target alone, which does not depend on the link, ran at {slowest:.1f} to "
            f"{fastest:.1f} tokens per second in the cells of one temperature."
        )
    if found := outliers(rows):
        yield (
            "Predictions with a larger error, split into tokens per round and rounds per second; each is predicted "
            "over measured, minus 1. With `auto`, small differences in time move the start of the rounds, which "
            "changes their acceptance. In `topk` and `topp` above temperature 0 the answer itself differs:\n\n"
            + lines([_OUTLIER_HEAD, *map(_outlier_line, found)])
        )


def _outlier_line(outlier: Outlier) -> list[str]:
    errors = (outlier.error, outlier.tokens_error, outlier.rate_error)
    return [
        _cell_name(outlier.cell),
        outlier.case,
        *("–" if error is None else f"{100 * error:+.0f} %" for error in errors),
    ]


def _share_of_quiet_cells(predicted: Rows) -> str:
    quiet = [row for row in predicted if is_quiet(row)]
    if len(quiet) in (0, len(predicted)):
        return ""
    share = share_within_tolerance(quiet) or 0
    return f" On an otherwise idle machine it is {100 * share:.0f} % of {len(quiet)}."


def _widest_drift(rows: Rows) -> tuple[float, float]:
    """Smallest and largest throughput of the target alone, at the temperature where their ratio is largest."""
    speeds: dict[float, list[float]] = {}
    for row in rows:
        if row["case"] == TARGET.name and row["tokens_per_second"]:
            speeds.setdefault(number(row, "temperature"), []).append(number(row, "tokens_per_second"))
    return max(((min(one), max(one)) for one in speeds.values()), key=lambda ends: ends[1] / ends[0])


def _errors_by_case(rows: Rows) -> str:
    head = ["case", "predictions", f"within {100 * TOLERANCE:.0f} %", "mean error", "largest error", "in cell"]
    case_lines = [head]
    for case in dict.fromkeys(str(row["case"]) for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        errors = [number(row, "prediction_error") for row in of_case]
        largest = max(range(len(errors)), key=lambda index: abs(errors[index]))
        case_lines.append(
            [
                case,
                str(len(errors)),
                f"{100 * (share_within_tolerance(of_case) or 0):.0f} %",
                f"{100 * sum(errors) / len(errors):+.0f} %",
                f"{100 * errors[largest]:+.0f} %",
                _cell_name(cell_of(of_case[largest])),
            ]
        )
    return lines(case_lines)


def _cell_name(cell: Cell) -> str:
    return f"temperature {cell.temperature:g}, {cell.round_trip_ms:g} ms, {cell.uplink_mbit:g} Mbit/s"
