"""docs/results.md and its plots, written from result files alone; a missing file is reported as not measured."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bench.grid.cells import ROUND_TRIPS_MS, TEMPERATURES, UPLINKS_MBIT, cells
from bench.report.grid_section import grid_parts
from bench.report.markdown import by_case, table
from bench.report.pair_section import (
    PAIR_COMMANDS,
    agreement_parts,
    category_parts,
    lookup_parts,
    pair_grid_parts,
    peer_parts,
    verification_parts,
    weights_parts,
)
from bench.report.plots import plot_draft_lens, plot_uplink
from bench.setup.options import console
from bench.setup.results import Results, format_value, number
from protocol.errors import SettingsError

COMMANDS = {
    "theory": "edgedraft-bench theory",
    "link": "edgedraft-bench link",
    "uplink": "edgedraft-bench uplink --bundle build/bundle --target build/sample",
    "ahead": (
        "edgedraft-bench ahead --bundle build/bundle --target build/sample --prompts FILE --count 13 "
        "--repeats 1 --max-new-tokens 64 --draft-len 8 --draft-len 16 --round-trip-ms 0 --round-trip-ms 20 "
        "--round-trip-ms 50 --round-trip-ms 100 --round-trip-ms 200 --uplink-mbit 1 --uplink-mbit 50"
    ),
    "fresh": "edgedraft-bench fresh --bundle build/bundle --target build/sample --prompts FILE",
    "fresh_long": (
        "edgedraft-bench fresh --bundle build/bundle --target build/sample --prompts FILE --count 4 "
        "--prompt-tokens 1500"
    ),
    "draft": "edgedraft-bench draft --bundle build/bundle-int4 --target build/sample",
    "grid": "edgedraft-bench grid --dtype float32 --bundle build/bundle --target build/sample",
    "capacity": "edgedraft-bench capacity --bundle build/bundle --target build/sample --turns 2 --seconds 4",
    "churn": "edgedraft-bench churn --bundle build/bundle --target build/sample --recording rounds.jsonl",
    "ceiling": (
        "edgedraft-bench ceiling --shape 7b --torch-device cuda --sessions 1 --sessions 16 --sessions 32 --sessions 64"
    ),
}
_CEILING_CASES = {
    "packed": "a forward pass of the base station, including verification",
    "dense": "transformers' batch with the same tokens",
    "continuous": "transformers' continuous batching, one token per session",
    "target": "the base station without drafts, one token per session",
}
CEILING_GOAL = 0.85
"""Share of the best rival's tokens per second that a packed pass of 64 sessions should reach."""


def report(
    results: Annotated[Path, typer.Option(help="Folder with the JSON files that the commands wrote.")] = (
        Path("docs/results")
    ),
    docs: Annotated[Path, typer.Option(help="Folder to write results.md and plots/ into.")] = Path("docs"),
) -> None:
    """Write docs/results.md and its plots from the result files."""
    console.print(f"wrote {write_report(results, docs)}")


def write_report(results_folder: Path, docs: Path) -> Path:
    """Write ``results.md`` and ``plots/`` into the folder ``docs``, and return the report's path.

    Raises:
        SettingsError: the folder of results does not exist.
    """
    if not results_folder.is_dir():
        raise SettingsError("results", str(results_folder), "a folder with the JSON files that edgedraft-bench wrote")
    docs.mkdir(parents=True, exist_ok=True)
    found = {name: _read(results_folder / f"{name}.json") for name in (*COMMANDS, *PAIR_COMMANDS)}
    plots = docs / "plots"
    parts = [_introduction(), *_theory(found["theory"], plots), *_link(found["link"])]
    parts += [*_uplink(found["uplink"], plots), *_ahead(found["ahead"])]
    parts += [*_fresh(found), *_draft(found["draft"]), *_grid(found["grid"], plots)]
    parts += [*_capacity(found["capacity"]), *_churn(found["churn"]), *_ceiling(found["ceiling"])]
    parts += _pair(found, plots)
    path = docs / "results.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _read(path: Path) -> Results | None:
    return Results.read(path) if path.exists() else None


def _introduction() -> str:
    return (
        "# Results\n\n"
        "Written by `edgedraft-bench report` from the files in `docs/results/`. Each section names the command that "
        "measured it, run with `--json docs/results/NAME.json`. [benchmarks.md](benchmarks.md) explains the methods."
    )


def _section(title: str, name: str, results: Results | None, missing: str = "Not measured.") -> Iterator[str]:
    yield f"## {title}\n\n`{(COMMANDS | PAIR_COMMANDS)[name]}`"
    if results is None:
        yield missing
        return
    machine = ", ".join(f"{key} {value}" for key, value in results.machine.items())
    settings = ", ".join(f"{key.replace('_', ' ')} {format_value(value)}" for key, value in results.settings.items())
    yield f"Machine: {machine}." + (f" Settings: {settings}." if settings else "")


def _theory(results: Results | None, plots: Path) -> Iterator[str]:
    yield from _section("The paper's tables", "theory", results)
    if results is None:
        return
    plot_draft_lens(results, plots / "draft_lens.svg")
    cases = by_case(results.rows)
    for case, text in (
        (
            "optimal draft length",
            "Optimal draft length for an acceptance α and a cost L. `adaptive` 0 means that the target alone is best.",
        ),
        ("cost of a drafted token", "Cost L of a drafted token when K of its 32,000 probabilities are sent."),
        ("round trip", "Best speedup when every round waits for a round trip."),
        ("closed form and brute force", "The closed form against a search over all draft lengths."),
        (
            "simulated rounds",
            "Tokens per round of 100,000 simulated rounds against E(γ), with the difference in standard errors.",
        ),
    ):
        yield f"{text}\n\n{table(cases[case], leave_out=('case',))}"
    yield "![optimal draft length over acceptance and cost](plots/draft_lens.svg)"


def _link(results: Results | None) -> Iterator[str]:
    yield from _section("Accuracy of the emulated link", "link", results)
    if results is None:
        return
    rate = max(abs(number(row, "rate_error")) for row in results.rows)
    without_jitter = [row for row in results.rows if "jitter" not in str(row["case"])]
    typical = max(abs(number(row, "median_error_milliseconds")) for row in without_jitter)
    largest = max(number(row, "max_error_milliseconds") for row in results.rows)
    yield (
        f"Delivered rates are within {100 * rate:.1f} % of the requested rate. Without jitter, median delays are "
        f"within {typical:.2f} ms. The latest message of all arrived {largest:.2f} ms late.\n\n{table(results.rows)}"
    )


def _uplink(results: Results | None, plots: Path) -> Iterator[str]:
    yield from _section("Uplink bytes and acceptance of a drafted token", "uplink", results)
    if results is None:
        return
    plot_uplink(results, plots / "uplink.svg")
    yield (
        "Bytes at the socket per token, in rounds of 8 tokens. `paper bytes` counts K probabilities in FP16 without "
        "token ids, as the paper does. At temperature 0 each distribution has one entry, so all modes have the same "
        "acceptance.\n\n" + table(results.rows)
    )
    yield "![acceptance over bytes](plots/uplink.svg)"


def _ahead(results: Results | None) -> Iterator[str]:
    yield from _section("Drafts in flight", "ahead", results)
    if results:
        yield (
            "Tokens per second after the first, device and base station on one core each. Ratios are medians of paired "
            "answers with a bootstrap 95 % interval: over the target alone, and over the best fixed draft length, with "
            "one Draft at a time or (`times best fixed`) of all cases. Those that begin with `whole` include the "
            "prompt: a fixed draft length asks for no token while the draft model runs the prompt, so that its first "
            "tokens come later and several at once, after which its clock begins. `times round model` compares with "
            "`RoundTimes.run_seconds`; `invalidated share` is that of the Drafts' bytes. `docs/results/ahead.json` has "
            "the fixed draft lengths too."
        )
        yield table([row for row in results.rows if row["case"] == "target alone" or "auto" in str(row["case"])])


def _fresh(found: Mapping[str, Results | None]) -> Iterator[str]:
    explained = (
        "Each answer is a process of its own, whose time includes the prompt: `no state` is the first answer ever, "
        "`state` one after others. Ratios are medians over the prompts with a bootstrap 95 % interval."
    )
    for name, prompt in (("fresh", "prompt"), ("fresh_long", "long prompt")):
        results = found[name]
        yield from _section(f"A process for each answer to a {prompt}", name, results)
        if results:
            yield f"{explained}\n\n{table(results.rows)}"


def _draft(results: Results | None) -> Iterator[str]:
    yield from _section("Speed of drafting", "draft", results)
    if results is None:
        return
    yield (
        "Per token, at temperature 0; all cases but llama.cpp run the same graph. `spread` is the range over the "
        "prompts relative to the median, `edgedraft speedup` the median ratio of a case's time to edgedraft's on the "
        "same prompt. `numpy share` is the time outside ONNX Runtime, encoding included; `bandwidth share` is the time "
        "in which the weights can be read.\n\n" + table(results.rows)
    )


def _grid(results: Results | None, plots: Path) -> Iterator[str]:
    yield from _section("Speedup over a grid of links", "grid", results)
    if results is not None:
        wanted = cells(TEMPERATURES, ROUND_TRIPS_MS, UPLINKS_MBIT)
        yield from grid_parts(results, plots, [cell for cell in wanted if cell.round_trip_ms is not None])


def _capacity(results: Results | None) -> Iterator[str]:
    yield from _section("Capacity of one base station", "capacity", results)
    if results is None:
        return
    yield (
        "`replay`: devices that replay recorded rounds. `target`: the target alone decodes for the same number of "
        "sessions. `rounds`: rounds of running devices, without and with prefills of long prompts beside them. "
        "`packed_pass` and `dense_pass`: forward passes of the base station and of transformers. Milliseconds are per "
        "round or per pass.\n\n" + table([row for row in results.rows if not {"ratio", "gain"} & set(row)])
    )
    yield table([row for row in results.rows if "ratio" in row])
    if gains := [row for row in results.rows if "gain" in row]:
        yield (
            "Tokens per second with drafts from devices over those with the draft model beside the target on the same "
            "cores, and the gain of 1 + γ·t_draft/t_verify sessions that arXiv:2606.25091 predicts:\n\n" + table(gains)
        )


def _churn(results: Results | None) -> Iterator[str]:
    yield from _section("Devices that connect and disconnect", "churn", results)
    if results is not None:
        yield (
            "Memory and counters of the base station. Every other device drops its connection without closing its "
            "session.\n\n" + table(results.rows)
        )


def _ceiling(results: Results | None) -> Iterator[str]:
    missing = "Not measured: it needs a CUDA device, and none was available."
    yield from _section("A large target on a GPU", "ceiling", results, missing)
    if results is None:
        return
    cases = by_case(results.rows)
    compared = cases.pop("comparison")
    reached = [
        f"{number(row, 'share_of_ceiling'):.2f} at context length {row['context']}"
        for row in compared
        if row["sessions"] == 64 and row["share_of_ceiling"] is not None
    ]
    described = ". ".join(f"`{case}`: {_CEILING_CASES[case]}" for case in cases)
    yield (
        f"{described}. The better of transformers' passes is the ceiling. Tokens per second count the tokens that a "
        "pass runs.\n\n" + table([row for rows in cases.values() for row in rows])
    )
    yield (
        f"Share of the ceiling that a packed pass of 64 sessions reaches: {', '.join(reached) or 'not measured'} "
        f"(goal: {CEILING_GOAL:g}). `max gain over target`: the gain of drafting if all drafted tokens were accepted."
        "\n\n" + table(compared, leave_out=("case",))
    )


def _pair(found: Mapping[str, Results | None], plots: Path) -> Iterator[str]:
    """The sections of a pair that was measured."""
    for name, title, parts in (
        ("categories", "categories of prompts", category_parts),
        ("pair_grid", "a grid of links", partial(pair_grid_parts, plots=plots)),
        ("peers", "other programs", peer_parts),
        ("lookup", "prompt lookup on code edits", lookup_parts),
        ("lookup_without_amx", "prompt lookup on code edits without matrix instructions", lookup_parts),
        ("lookup_categories", "prompt lookup by category", lookup_parts),
        ("lookup_others", "prompt lookup in the other categories", lookup_parts),
        ("lookup_math", "prompt lookup on many prompts of one category", lookup_parts),
        ("verification", "block verification", verification_parts),
        ("bridge", "a draft model of another vocabulary", category_parts),
        ("bridge_small", "a draft model of another vocabulary for a smaller target", category_parts),
        ("agreement", "agreement of a draft model of another vocabulary", agreement_parts),
        ("weights", "int8 weights of the target", weights_parts),
    ):
        if results := found[name]:
            yield from _section(f"A real pair: {title}", name, results)
            yield from parts(results)
