"""Tokens a second and what they are worth: ``demo``, ``speedup`` and ``exact``."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.setup.options import (
    BundleOption,
    DtypeOption,
    JsonOption,
    PromptsOption,
    TargetOption,
    console,
    progress_bar,
)
from protocol.errors import SettingsError
from protocol.messages import Sampling

if TYPE_CHECKING:  # the libraries behind it load when a command needs them
    from bench.grid.cells import Cell
    from bench.grid.run import GridSettings

GRID = "A grid of links"


def demo(bundle: BundleOption, target: TargetOption, dtype: DtypeOption = "bfloat16") -> None:
    """Stream an answer in colour, then show what drafting was worth."""
    from bench.demo import show_demo
    from bench.setup.bench_setup import bench_setup
    from bench.setup.station_process import running_station

    with ExitStack() as stack:
        with console.status("starting a base station"):
            place = stack.enter_context(bench_setup(bundle, stack.enter_context(running_station(target, dtype))))
        show_demo(place, console)
    console.print("next: edgedraft-device chat, or edgedraft-bench speedup (see README.md)")


def speedup(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    prompts: PromptsOption = None,
    count: Annotated[
        int | None, typer.Option(help="How many prompts; 8, or in a grid 3 at temperature 0 and 20 above.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens for each; 128, or in a grid 64 at temperature 0 and 32 above.")
    ] = None,
    draft_len: Annotated[
        int | None, typer.Option(help="Tokens drafted in a round; left out, planned anew after each.")
    ] = None,
    temperatures: Annotated[
        list[float] | None,
        typer.Option("--temperature", help="0 takes mode ids, above 0 coupled, topk, full; a grid takes several."),
    ] = None,
    uplink_k: Annotated[int, typer.Option(help="Entries sent of each distribution in mode topk.")] = 32,
    grid: Annotated[bool, typer.Option("--grid", help="Measure over a grid of links.", rich_help_panel=GRID)] = False,
    round_trips: Annotated[
        list[float] | None, typer.Option("--round-trip-ms", help="0, 10, 20, 50 and 100.", rich_help_panel=GRID)
    ] = None,
    uplinks: Annotated[
        list[float] | None, typer.Option("--uplink-mbit", help="1, 5 and 50.", rich_help_panel=GRID)
    ] = None,
    answer_seconds: Annotated[
        float | None,
        typer.Option(
            help="For each answer at most, but two rounds; 3 at temperature 0, 2 above.", rich_help_panel=GRID
        ),
    ] = None,
    repeat_busy: Annotated[
        bool,
        typer.Option("--repeat-busy", help="Measure cells again that shared the machine.", rich_help_panel=GRID),
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Tokens a second with drafting against the target alone, both in one run: over loopback, or a grid of links.

    A grid is written to the JSON file cell by cell; the same command goes on where the file ends.
    """
    from bench.setup.prompts import read_prompts

    if grid or round_trips or uplinks:
        from bench.grid.cells import ROUND_TRIPS_MS, TEMPERATURES, UPLINKS_MBIT, Answers, cells
        from bench.grid.run import GridSettings
        from bench.grid.throughput import Length

        greedy, sampled = (
            Answers(read_prompts(prompts, count or many), Length(max_new_tokens or tokens, answer_seconds or seconds))
            for many, tokens, seconds in ((3, 64, 3.0), (20, 32, 2.0))
        )
        wanted = cells(temperatures or TEMPERATURES, round_trips or ROUND_TRIPS_MS, uplinks or UPLINKS_MBIT)
        _measure_grid(bundle, GridSettings(target, dtype, greedy, sampled), wanted, json_file, repeat_busy)
        return
    from bench.grid.speedup import SpeedupSettings, measure_speedup, results
    from bench.setup.bench_setup import bench_setup
    from bench.setup.station_process import running_station

    if temperatures and len(temperatures) > 1:
        raise SettingsError("temperature", temperatures, "one, or several together with --grid")
    chosen = read_prompts(prompts, count or 8)
    settings = SpeedupSettings(max_new_tokens or 128, draft_len, temperatures[0] if temperatures else 0.0, uplink_k)
    with running_station(target, dtype) as address, bench_setup(bundle, address) as place, progress_bar() as progress:
        task = progress.add_task("answers", total=len(chosen) * len(settings.cases()))
        rows = measure_speedup(place, chosen, settings, lambda: progress.advance(task))
        measured = results(place, rows, settings, dtype)
    measured.show(console)
    measured.write(json_file)


def _measure_grid(
    bundle: Path, settings: "GridSettings", wanted: list["Cell"], json_file: Path | None, repeat_busy: bool
) -> None:
    from bench.grid.cell_file import CellFile
    from bench.grid.cells import Cell, cases
    from bench.grid.run import GridRun
    from bench.grid.summary import shown
    from bench.setup.results import Results

    with progress_bar() as progress, GridRun(bundle, settings, lambda: progress.advance(task)) as run:
        kept = CellFile(json_file, run.described())
        missing = [cell for cell in wanted if not kept.is_done(cell, repeat_busy)]
        answers = sum(len(settings.answers(cell).prompts) * len(cases(cell)) for cell in missing)
        task = progress.add_task("answers", total=answers)
        for cell in missing:
            loopback = kept.rows_of(Cell(cell.temperature)) if cell.round_trip_ms is not None else []
            kept.add(cell, run.cell_rows(cell, loopback))
        for cell in wanted:  # predictions follow the loopback cell, which may be younger
            if rows := kept.rows_of(cell):
                run.compare(rows, cell, kept.rows_of(Cell(cell.temperature)))
                kept.add(cell, rows)
    Results({}, shown([row for cell in wanted for row in kept.rows_of(cell)])).show(console)


def exact(
    bundle: BundleOption,
    target: TargetOption,
    prompts: PromptsOption = None,
    count: Annotated[int, typer.Option(help="How many prompts.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens for each.")] = 64,
    draft_lens: Annotated[list[int] | None, typer.Option("--draft-len", help="May be repeated.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes mode ids, above 0 coupled.")] = 0.0,
    json_file: JsonOption = None,
) -> None:
    """Hold answers, token for token, against transformers' own or the target alone, in float32."""
    from bench.exact import TargetAlone, Transformers, differences
    from bench.setup.bench_setup import bench_setup
    from bench.setup.prompts import read_prompts
    from bench.setup.results import Results
    from bench.setup.station_process import running_station

    chosen = read_prompts(prompts, count)
    lengths, sampling = draft_lens or [1, 4, 8], Sampling(temperature, seed=1)
    with (
        running_station(target, "float32") as address,
        bench_setup(bundle, address) as place,
        progress_bar() as progress,
    ):
        task = progress.add_task("answers", total=len(chosen) * (1 + len(lengths)))
        reference = Transformers(target) if sampling.greedy else TargetAlone(place, sampling)
        found = differences(place, reference, chosen, max_new_tokens, sampling, lengths, lambda: progress.advance(task))
    rows = [
        {
            "case": f"draft_len {length}",
            "prompts": len(chosen),
            "differ": sum(one.draft_len == length for one in found),
            "differ_without_tie": sum(one.draft_len == length and not one.is_tie for one in found),
            "largest_gap": max((one.gap for one in found if one.draft_len == length and one.gap), default=None),
        }
        for length in lengths
    ]
    measured = Results(
        {"target": target, "dtype": "float32", "temperature": temperature, "max_new_tokens": max_new_tokens}, rows
    )
    measured.show(console)
    measured.write(json_file)
    if any(not one.is_tie for one in found) or len({one.prompt for one in found}) * 40 > len(chosen):
        raise typer.Exit(1)
