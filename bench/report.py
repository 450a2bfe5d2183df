"""docs/results.md and its plots, from result files alone: what they do not hold, the report says is not measured."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.grid import COLOCATED, ROUND_TRIPS_MS, TARGET, TEMPERATURES, UPLINKS_MBIT, Cell, cells
from bench.grid_summary import NEAR, QUIET_LOAD, auto_paces, cell_of, is_quiet, predicted_rows, share_near
from bench.plots import plot_draft_lens, plot_speedup, plot_uplink
from bench.results import Results, Value, format_value, number

NEAR_BEST = 0.93
COMMANDS = {
    "theory": "edgedraft-bench theory",
    "link": "edgedraft-bench link",
    "uplink": "edgedraft-bench uplink --bundle build/bundle --target build/sample",
    "speedup": "edgedraft-bench speedup --grid --bundle build/bundle --target build/sample",
    "ceiling": "edgedraft-bench ceiling --shape 7b --torch-device cuda",
}
OF_THE_CEILING = 0.8
"""What a packed pass of 64 sessions should reach."""
WHY = (
    "times are those of a few short answers, and the machine's speed drifts: the target alone, which no link slows, "
    "ran at {least:.1f} to {most:.1f} tokens a second in cells of one temperature",
    "`auto`: the prediction lets the plan run for thousands of tokens; a measured answer is short, begins with what "
    "the plan learnt from 24 tokens, and a trial of the other way or one bad stretch moves it",
    "full vocabulary: few rounds fit into the time of an answer; one rejection more or less moves its pace",
)

Rows = Sequence[Mapping[str, Value]]


def write_report(results_folder: Path, docs: Path) -> Path:
    """Write ``results.md`` and ``plots/`` into the folder ``docs``; gives the report's path."""
    found = {name: _read(results_folder / f"{name}.json") for name in COMMANDS}
    plots = docs / "plots"
    parts = [_head(), *_theory(found["theory"], plots), *_link(found["link"])]
    parts += [*_uplink(found["uplink"], plots), *_speedup(found["speedup"], plots), *_ceiling(found["ceiling"])]
    path = docs / "results.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _read(path: Path) -> Results | None:
    return Results.read(path) if path.exists() else None


def _head() -> str:
    return (
        "# Results\n\n"
        "Written by `edgedraft-bench report` from the files in `docs/results/`; each section names the command that "
        "measured it (with `--json docs/results/NAME.json`). What is missing was not measured."
    )


def _section(title: str, name: str, results: Results | None, missing: str = "Not measured.") -> Iterator[str]:
    yield f"## {title}\n\n`{COMMANDS[name]}`"
    if results is None:
        yield missing
        return
    machine = ", ".join(f"{key} {value}" for key, value in results.machine.items())
    settings = ", ".join(f"{key.replace('_', ' ')} {format_value(value)}" for key, value in results.settings.items())
    yield f"Measured on: {machine}." + (f" With: {settings}." if settings else "")


def _theory(results: Results | None, plots: Path) -> Iterator[str]:
    yield from _section("The paper's numbers", "theory", results)
    if results is None:
        return
    plot_draft_lens(results, plots / "draft_lens.svg")
    by_case = _by_case(results.rows)
    for case, text in (
        (
            "best draft length",
            "Best draft length for acceptance α and cost L; adaptive 0: the target alone.",
        ),
        ("cost of a drafted token", "Cost L of a drafted token of whose 32,000 probabilities K are sent."),
        ("round trip", "Best speedup when each round waits for a round trip."),
        ("closed form against brute force", "The closed form against the search over all draft lengths."),
        ("simulated rounds", "Tokens of 100,000 simulated rounds against E; deviations in standard errors."),
    ):
        yield f"{text}\n\n{_table(by_case[case], leave_out=('case',))}"
    yield "![best draft length over acceptance and cost](plots/draft_lens.svg)"


def _link(results: Results | None) -> Iterator[str]:
    yield from _section("The emulated link", "link", results)
    if results is None:
        return
    rate = max(abs(number(row, "rate_error")) for row in results.rows)
    typical = max(
        abs(number(row, "median_milliseconds_off")) for row in results.rows if "up to" not in str(row["case"])
    )
    most = max(number(row, "most_milliseconds_off") for row in results.rows)
    yield (
        f"Delivered rates are within {100 * rate:.1f} % of what was asked; median delays within {typical:.2f} ms where "
        f"there is no jitter; the latest single message of all was {most:.2f} ms late.\n\n{_table(results.rows)}"
    )


def _uplink(results: Results | None, plots: Path) -> Iterator[str]:
    yield from _section("What a drafted token costs, and how likely it stands", "uplink", results)
    if results is None:
        return
    plot_uplink(results, plots / "uplink.svg")
    yield (
        "Bytes at the socket, of rounds of 8 tokens; `papers bytes` are K numbers in FP16 without the ids, as the "
        "paper counts them. At temperature 0 a distribution is a single token, so all modes accept alike.\n\n"
        + _table(results.rows)
    )
    yield "![acceptance over bytes](plots/uplink.svg)"


def _speedup(results: Results | None, plots: Path) -> Iterator[str]:
    yield from _section("Speedups over a grid of links", "speedup", results)
    if results is None:
        return
    yield (
        "Tokens a second against the target alone over the same link, behind the first tokens of each answer; in "
        "brackets what the extended model predicts from loopback. A number below 1 is a loss. Full vocabulary: with "
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
    yield f"### Loopback, which the predictions are made from\n\n{_table(loopback, leave_out=_LEFT_OUT)}"


_LEFT_OUT = (
    "rounds",
    "round_trip_ms",
    "uplink_mbit",
    "mode",
    "prediction_error",
    "predicted_speedup",
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
    lines = [["round trip, ms", "uplink, Mbit/s", "load average", "target alone, tokens/s", *names, COLOCATED]]
    for round_trip, rate in places:
        of_cell = {
            str(row["case"]): row for row in linked if (row["round_trip_ms"], row["uplink_mbit"]) == (round_trip, rate)
        }
        alone = [format_value(of_cell[TARGET.name][name]) for name in ("load_average", "tokens_per_second")]
        figures = [_speedup_cell(of_cell.get(name)) for name in names]
        lines.append([f"{round_trip:g}", f"{rate:g}", *alone, *figures, _speedup_cell(colocated)])
    return _lines(lines)


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
        lines = [[_cell_name(one.cell), str(one.best_draft_len), f"{one.share:.2f}"] for one in behind]
        yield "Where it does not:\n\n" + _lines([["cell", "best draft length", "share"], *lines])
    if predicted:
        share = share_near(predicted) or 0.0
        yield (
            f"{100 * share:.0f} % of {len(predicted)} predictions lie within {100 * NEAR:.0f} % of what was measured."
            f"{_share_quiet(predicted)}\n\n{_errors_by_case(predicted)}"
        )
        least, most = _widest_drift(results.rows)
        reasons = [text.format(least=least, most=most) for text in WHY]
        yield "Where they are off, and why:\n\n" + "\n".join(f"- {reason}." for reason in reasons)


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
    lines = [["case", "predictions", f"within {100 * NEAR:.0f} %", "mean error", "furthest off", "there"]]
    for case in dict.fromkeys(str(row["case"]) for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        errors = [number(row, "prediction_error") for row in of_case]
        furthest = max(range(len(errors)), key=lambda place: abs(errors[place]))
        lines.append(
            [
                case,
                str(len(errors)),
                f"{100 * (share_near(of_case) or 0):.0f} %",
                f"{100 * sum(errors) / len(errors):+.0f} %",
                f"{100 * errors[furthest]:+.0f} %",
                _cell_name(cell_of(of_case[furthest])),
            ]
        )
    return _lines(lines)


def _cells(missing: Sequence[Cell]) -> str:
    return "; ".join(map(_cell_name, missing))


def _cell_name(cell: Cell) -> str:
    return f"temperature {cell.temperature:g}, {cell.round_trip_ms:g} ms, {cell.uplink_mbit:g} Mbit/s"


def _is_of(row: Mapping[str, Value], cell: Cell) -> bool:
    columns = cell.columns()
    return {name: row[name] for name in columns} == columns


def _ceiling(results: Results | None) -> Iterator[str]:
    missing = "Not measured: no CUDA device was at hand."
    yield from _section("A large target on a graphics card", "ceiling", results, missing)
    if results is None:
        return
    by_case = _by_case(results.rows)
    compared = by_case.pop("compared")
    reached = [
        f"{number(row, 'of_the_ceiling'):.2f} at contexts of {row['context']}"
        for row in compared
        if row["sessions"] == 64 and row["of_the_ceiling"] is not None
    ]
    yield (
        "`packed`: a pass of the base station, its rounds judged; `dense`: transformers' batch of as many tokens, the "
        "ceiling; `target`: the base station without drafts, a token a session. Tokens are those that are run.\n\n"
        + _table([row for rows in by_case.values() for row in rows])
    )
    yield (
        f"At 64 sessions a packed pass reaches, of the ceiling: {', '.join(reached) or 'not measured'} (asked: "
        f"{OF_THE_CEILING:g}). `most over target`: what drafts gain of which all tokens stand.\n\n"
        + _table(compared, leave_out=("case",))
    )


def _by_case(rows: Rows) -> dict[str, list[Mapping[str, Value]]]:
    found: dict[str, list[Mapping[str, Value]]] = {}
    for row in rows:
        found.setdefault(str(row["case"]), []).append(row)
    return found


def _table(rows: Rows, leave_out: Sequence[str] = ()) -> str:
    names = [name for name in rows[0] if name not in leave_out]
    head = [name.replace("_", " ") for name in names]
    return _lines([head, *([format_value(row[name]) for name in names] for row in rows)])


def _lines(cells_of_lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its head first."""
    head, *rest = (f"| {' | '.join(line)} |" for line in cells_of_lines)
    return "\n".join([head, "|---" * len(cells_of_lines[0]) + "|", *rest])
