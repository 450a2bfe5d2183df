"""docs/results.md and its plots, from result files alone: what they do not hold, the report says is not measured."""

from collections.abc import Iterator
from pathlib import Path

from bench.report.grid_tables import grid_parts
from bench.report.markdown import by_case, table
from bench.report.plots import plot_draft_lens, plot_uplink
from bench.setup.results import Results, format_value, number
from protocol.errors import SettingsError

COMMANDS = {
    "theory": "edgedraft-bench theory",
    "link": "edgedraft-bench link",
    "uplink": "edgedraft-bench uplink --bundle build/bundle --target build/sample",
    "speedup": "edgedraft-bench speedup --grid --dtype float32 --bundle build/bundle --target build/sample",
    "capacity": "edgedraft-bench capacity --bundle build/bundle --target build/sample --turns 2 --seconds 4",
    "churn": "edgedraft-bench churn --bundle build/bundle --target build/sample --recording rounds.jsonl",
    "ceiling": "edgedraft-bench ceiling --shape 7b --torch-device cuda",
}
OF_THE_CEILING = 0.8
"""What a packed pass of 64 sessions should reach."""


def write_report(results_folder: Path, docs: Path) -> Path:
    """Write ``results.md`` and ``plots/`` into the folder ``docs``; gives the report's path.

    Raises:
        SettingsError: there is no folder of results.
    """
    if not results_folder.is_dir():
        raise SettingsError("results", str(results_folder), "a folder with the JSON files that edgedraft-bench wrote")
    docs.mkdir(parents=True, exist_ok=True)
    found = {name: _read(results_folder / f"{name}.json") for name in COMMANDS}
    plots = docs / "plots"
    parts = [_head(), *_theory(found["theory"], plots), *_link(found["link"])]
    parts += [*_uplink(found["uplink"], plots), *_speedup(found["speedup"], plots), *_capacity(found["capacity"])]
    parts += [*_churn(found["churn"]), *_ceiling(found["ceiling"])]
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
    cases = by_case(results.rows)
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
        yield f"{text}\n\n{table(cases[case], leave_out=('case',))}"
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
        f"there is no jitter; the latest single message of all was {most:.2f} ms late.\n\n{table(results.rows)}"
    )


def _uplink(results: Results | None, plots: Path) -> Iterator[str]:
    yield from _section("What a drafted token costs, and how likely it stands", "uplink", results)
    if results is None:
        return
    plot_uplink(results, plots / "uplink.svg")
    yield (
        "Bytes at the socket, of rounds of 8 tokens; `papers bytes` are K numbers in FP16 without the ids, as the "
        "paper counts them. At temperature 0 a distribution is a single token, so all modes accept alike.\n\n"
        + table(results.rows)
    )
    yield "![acceptance over bytes](plots/uplink.svg)"


def _speedup(results: Results | None, plots: Path) -> Iterator[str]:
    yield from _section("Speedups over a grid of links", "speedup", results)
    if results is not None:
        yield from grid_parts(results, plots)


def _capacity(results: Results | None) -> Iterator[str]:
    yield from _section("What one base station serves", "capacity", results)
    if results is None:
        return
    yield (
        "`replay`: devices whose rounds were recorded; `target`: the target alone decodes for as many; `rounds`: of "
        "running devices, without and with long prompts coming in; milliseconds of a round, or of a pass.\n\n"
        + table([row for row in results.rows if "ratio" not in row])
    )
    yield table([row for row in results.rows if "ratio" in row])


def _churn(results: Results | None) -> Iterator[str]:
    yield from _section("Devices that come and go", "churn", results)
    if results is not None:
        yield table(results.rows)


def _ceiling(results: Results | None) -> Iterator[str]:
    missing = "Not measured: it takes a CUDA device, and none was at hand."
    yield from _section("A large target on a graphics card", "ceiling", results, missing)
    if results is None:
        return
    cases = by_case(results.rows)
    compared = cases.pop("compared")
    reached = [
        f"{number(row, 'of_the_ceiling'):.2f} at contexts of {row['context']}"
        for row in compared
        if row["sessions"] == 64 and row["of_the_ceiling"] is not None
    ]
    yield (
        "`packed`: a pass of the base station, its rounds judged; `dense`: transformers' batch of as many tokens, the "
        "ceiling; `target`: the base station without drafts, a token a session. Tokens are those that are run.\n\n"
        + table([row for rows in cases.values() for row in rows])
    )
    yield (
        f"At 64 sessions a packed pass reaches, of the ceiling: {', '.join(reached) or 'not measured'} (asked: "
        f"{OF_THE_CEILING:g}). `most over target`: what drafts gain of which all tokens stand.\n\n"
        + table(compared, leave_out=("case",))
    )
