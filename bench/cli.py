"""``edgedraft-bench``: every figure of the documentation comes from one of these commands."""

from pathlib import Path
from typing import Annotated

import typer

from bench.commands_link import link, relay
from bench.commands_speed import demo, exact, speedup
from bench.commands_station import capacity, ceiling, churn, prefixes
from bench.commands_uplink import encodings, overheads, uplink
from bench.setup.options import JsonOption, console, progress_bar
from common.command_line import Verbose, run

app = typer.Typer(add_completion=False, help="Measure this system against its alternatives.", no_args_is_help=True)


@app.callback()
def options(verbose: Verbose = False) -> None:
    """Measure this system against its alternatives."""


def theory(json_file: JsonOption = None) -> None:
    """The paper's tables recomputed, its closed form against brute force, and simulated rounds."""
    from bench import theory as paper
    from bench.setup.results import Results

    with progress_bar() as progress:
        task = progress.add_task("values of alpha", total=len(paper.FINE_ALPHAS))
        found = paper.disagreements(lambda: progress.advance(task))
    tables = [*paper.draft_len_rows(), *paper.cost_rows(), *paper.round_trip_rows()]
    shown = Results({}, [*tables, paper.grid_row(found), *paper.simulated_rows()])
    shown.show(console)
    Results({}, [*shown.rows, *paper.map_rows()]).write(json_file)
    if any(not one.is_tie for one in found):
        raise typer.Exit(1)


def report(
    results: Annotated[Path, typer.Option(help="Folder with the JSON files that the commands wrote.")] = (
        Path("docs/results")
    ),
    docs: Annotated[Path, typer.Option(help="Folder to write results.md and plots/ into.")] = Path("docs"),
) -> None:
    """Write docs/results.md and its plots from result files alone."""
    from bench.report.report import write_report

    console.print(f"wrote {write_report(results, docs)}")


COMMANDS = (
    demo,
    speedup,
    exact,
    encodings,
    overheads,
    prefixes,
    uplink,
    theory,
    report,
    relay,
    link,
    capacity,
    ceiling,
    churn,
)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Run the command line."""
    run(app, "bench")
