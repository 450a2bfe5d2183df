"""What docs/results.md says of a measured grid: each cell, how well it was predicted, and how near ``auto`` comes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.grid.cells import COLOCATED, ROUND_TRIPS_MS, TARGET, TEMPERATURES, UPLINKS_MBIT, Cell, cells
from bench.grid.summary import (
    NEAR,
    QUIET_LOAD,
    Miss,
    auto_paces,
    cell_of,
    is_quiet,
    misses,
    predicted_rows,
    share_near,
)
from bench.report.markdown import Rows, lines, table
from bench.report.plots import plot_speedup
from bench.setup.results import Results, Value, format_value, number

NEAR_BEST = 0.93


def grid_parts(results: Results, plots: Path) -> Iterator[str]:
    """Paragraphs and tables; plots go into the folder ``plots``."""
    yield (
        "Tokens a second against the target alone over the same link, behind the first tokens of each answer; in "
        "brackets what the extended model predicts from loopback, with all computation as much slower or faster as "
        "the target alone is in the cell. A number below 1 is a loss. Full vocabulary: with "
        "the draft length of 1, 2 and 4 that is predicted best. Colocated: the draft model on the base station's core, "
        "measured once a temperature, since it needs no link."
    )
    for temperature in sorted({number(row, "temperature") for row in results.rows}):
        rows = [row for row in results.rows if row["temperature"] == temperature]
        yield f"### Temperature {temperature:g}\n\n{_grid(rows)}"
        if any(row["round_trip_ms"] is not None for row in rows):
            name = f"speedup_{temperature:g}.svg"
            plot_speedup(results, temperature, plots / name)
            yield f"![speedup over the round trip](plots/{name})"
    yield from _verdicts(results)
    loopback = [row for row in results.rows if row["round_trip_ms"] is None]
    yield f"### Loopback, which the predictions are made from\n\n{table(loopback, leave_out=_LEFT_OUT)}"


_LEFT_OUT = (
    "rounds",
    "round_trip_ms",
    "uplink_mbit",
    "mode",
    "prediction_error",
    "predicted_speedup",
    "predicted_tokens_per_round",
    "first_milliseconds",
)


def _grid(rows: Rows) -> str:
    """A line a cell, a column a case; what needs no link is the same in every line."""
    linked = [row for row in rows if row["round_trip_ms"] is not None]
    colocated = next((row for row in rows if row["case"] == COLOCATED), None)
    if not linked:
        return "No cell was measured."
    names = [name for name in dict.fromkeys(str(row["case"]) for row in linked) if name != TARGET.name]
    places = dict.fromkeys((number(row, "round_trip_ms"), number(row, "uplink_mbit")) for row in linked)
    of_cells = [["round trip, ms", "uplink, Mbit/s", "load average", "target alone, tokens/s", *names, COLOCATED]]
    for round_trip, rate in places:
        of_cell = {
            str(row["case"]): row for row in linked if (row["round_trip_ms"], row["uplink_mbit"]) == (round_trip, rate)
        }
        alone = [format_value(of_cell[TARGET.name][name]) for name in ("load_average", "tokens_per_second")]
        figures = [_speedup_cell(of_cell.get(name)) for name in names]
        of_cells.append([f"{round_trip:g}", f"{rate:g}", *alone, *figures, _speedup_cell(colocated)])
    return lines(of_cells)


def _speedup_cell(row: Mapping[str, Value] | None) -> str:
    if row is None:
        return "not measured"
    if row["failed"] is not None or row["speedup"] is None:
        return f"failed: {row['failed'] or 'no round was timed'}"
    predicted = row["predicted_speedup"]
    return f"{number(row, 'speedup'):.2f}" + (f" ({number(row, 'predicted_speedup'):.2f})" if predicted else "")


def _verdicts(results: Results) -> Iterator[str]:
    """Held against what the project set out for; what falls short is named."""
    wanted = [cell for cell in cells(TEMPERATURES, ROUND_TRIPS_MS, UPLINKS_MBIT) if cell.round_trip_ms is not None]
    missing = [cell for cell in wanted if not any(_is_of(row, cell) for row in results.rows)]
    paces = list(auto_paces(results.rows))
    behind = [pace for pace in paces if pace.share < NEAR_BEST]
    predicted = predicted_rows(results.rows)
    yield f"### As a whole\n\n{len(wanted) - len(missing)} of the {len(wanted)} cells of the grid were measured."
    if missing:
        yield f"Not measured: {_cells(missing)}."
    busy = {cell_of(row) for row in results.rows if row["round_trip_ms"] is not None and not is_quiet(row)}
    if busy:
        yield (
            f"The load average was above {QUIET_LOAD:g} in {len(busy)} of the cells: other programs ran on the two "
            "cores, and figures of such a cell say more about them than about the link."
        )
    if paces:
        least = min(one.share for one in paces)
        yield (
            f"`--draft-len auto` reaches {NEAR_BEST:g} of the best fixed draft length, the target alone being 0, in "
            f"{len(paces) - len(behind)} of {len(paces)} cells; the smallest share is {least:.2f}."
        )
    if behind:
        paces_behind = [
            [_cell_name(one.cell), str(one.best_draft_len), str(one.best_rounds or "–"), f"{one.share:.2f}"]
            for one in behind
        ]
        yield "Where it does not:\n\n" + lines([["cell", "best draft length", "rounds of it", "share"], *paces_behind])
        yield (
            "A fixed draft length decodes the same tokens in every cell of a temperature, so few rounds that went well "
            "or badly do so in all of them."
        )
    if predicted:
        share = share_near(predicted) or 0.0
        yield (
            f"{100 * share:.0f} % of {len(predicted)} predictions lie within {100 * NEAR:.0f} % of what was measured."
            f"{_share_quiet(predicted)}\n\n{_errors_by_case(predicted)}"
        )
        least, most = _widest_drift(results.rows)
        yield (
            f"The machine's speed drifts: the target alone, which no link slows, ran at {least:.1f} to {most:.1f} "
            "tokens a second in cells of one temperature."
        )
    if far := misses(results.rows):
        yield (
            "Those that are further off, and what of it lies in the tokens of a round and in the pace of rounds, each "
            "predicted over measured. `auto` begins its rounds at other "
            "places with every difference in times, so more or fewer tokens stand than foreseen; in `topk` and `topp` "
            "above temperature 0 the answer itself is another one:\n\n" + lines([_MISS_HEAD, *map(_miss_line, far)])
        )


_MISS_HEAD = ("cell", "case", "speedup", "tokens of a round", "pace of rounds")


def _miss_line(miss: Miss) -> list[str]:
    parts = (miss.error, miss.tokens, miss.seconds)
    return [_cell_name(miss.cell), miss.case, *("–" if one is None else f"{100 * one:+.0f} %" for one in parts)]


def _share_quiet(predicted: Rows) -> str:
    quiet = [row for row in predicted if is_quiet(row)]
    if len(quiet) in (0, len(predicted)):
        return ""
    return f" Where the machine was quiet it is {100 * (share_near(quiet) or 0):.0f} % of {len(quiet)}."


def _widest_drift(rows: Rows) -> tuple[float, float]:
    """Least and most tokens a second of the target alone, at the temperature where they lie furthest apart."""
    paces: dict[float, list[float]] = {}
    for row in rows:
        if row["case"] == TARGET.name and row["tokens_per_second"]:
            paces.setdefault(number(row, "temperature"), []).append(number(row, "tokens_per_second"))
    return max(((min(one), max(one)) for one in paces.values()), key=lambda ends: ends[1] / ends[0])


def _errors_by_case(rows: Rows) -> str:
    of_cases = [["case", "predictions", f"within {100 * NEAR:.0f} %", "mean error", "furthest off", "there"]]
    for case in dict.fromkeys(str(row["case"]) for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        errors = [number(row, "prediction_error") for row in of_case]
        furthest = max(range(len(errors)), key=lambda place: abs(errors[place]))
        of_cases.append(
            [
                case,
                str(len(errors)),
                f"{100 * (share_near(of_case) or 0):.0f} %",
                f"{100 * sum(errors) / len(errors):+.0f} %",
                f"{100 * errors[furthest]:+.0f} %",
                _cell_name(cell_of(of_case[furthest])),
            ]
        )
    return lines(of_cases)


def _cells(missing: Sequence[Cell]) -> str:
    return "; ".join(map(_cell_name, missing))


def _cell_name(cell: Cell) -> str:
    return f"temperature {cell.temperature:g}, {cell.round_trip_ms:g} ms, {cell.uplink_mbit:g} Mbit/s"


def _is_of(row: Mapping[str, Value], cell: Cell) -> bool:
    columns = cell.columns()
    return {name: row[name] for name in columns} == columns
