"""Measures the cells of a grid one after the other, each row beside its prediction."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import typer

from bench.grid.cell_file import CellFile
from bench.grid.cells import (
    DOWNLINK_MBIT,
    FULL,
    FULL_DRAFT_LENS,
    ROUND_TRIPS_MS,
    TEMPERATURES,
    UPLINKS_MBIT,
    AnswerLimits,
    Case,
    Cell,
    Workload,
    cases,
    cells,
)
from bench.grid.pair_run import PairRun
from bench.grid.prediction import CalibratedModel, Prediction
from bench.grid.rows import add_predictions, case_row
from bench.grid.summary import accuracy_text, display_rows, predicted_rows
from bench.grid.throughput import combined
from bench.setup.options import (
    MIN_MBIT,
    BundleOption,
    DtypeOption,
    JsonOption,
    PromptsOption,
    TargetOption,
    TemperaturesOption,
    console,
    progress_bar,
)
from bench.setup.prompts import read_prompts
from bench.setup.results import Results, Row
from protocol.messages import Mode


def grid(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    prompts: PromptsOption = None,
    count: Annotated[
        int | None, typer.Option(help="Number of prompts. Default: 3 at temperature 0, 20 above it.", min=1)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens per answer. Default: 64 at temperature 0, 32 above it.", min=1)
    ] = None,
    answer_seconds: Annotated[
        float | None,
        typer.Option(
            help="Longest time per answer, but at least two rounds. Default: 3 at temperature 0, 2 above it.", min=0
        ),
    ] = None,
    temperatures: TemperaturesOption = None,
    round_trips: Annotated[
        list[float] | None, typer.Option("--round-trip-ms", help="Repeatable. Default: 0, 10, 20, 50 and 100.", min=0)
    ] = None,
    uplinks: Annotated[
        list[float] | None, typer.Option("--uplink-mbit", help="Repeatable. Default: 1, 5 and 50.", min=MIN_MBIT)
    ] = None,
    repeat_busy: Annotated[
        bool, typer.Option("--repeat-busy", help="Measure cells again whose load average was above 2.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Compare tokens per second with drafting and with the target alone, over a grid of emulated links.

    The JSON file is written cell by cell; the same command continues an interrupted run.
    """
    greedy, sampled = (
        Workload(
            read_prompts(prompts, count or default_count),
            AnswerLimits(max_new_tokens or tokens, answer_seconds or seconds),
        )
        for default_count, tokens, seconds in ((3, 64, 3.0), (20, 32, 2.0))
    )
    wanted = cells(temperatures or TEMPERATURES, round_trips or ROUND_TRIPS_MS, uplinks or UPLINKS_MBIT)
    measure_grid(bundle, GridSettings(target, dtype, greedy, sampled), wanted, json_file, repeat_busy)


@dataclass(frozen=True)
class GridSettings:
    """What every cell is measured with: the workload ``greedy`` at temperature 0, ``sampled`` above it."""

    target: str
    dtype: str
    greedy: Workload
    sampled: Workload

    def workload(self, cell: Cell) -> Workload:
        """The workload of each case of a cell."""
        return self.sampled if cell.temperature else self.greedy


def measure_grid(
    bundle: Path, settings: GridSettings, wanted: Sequence[Cell], json_file: Path | None, repeat_busy: bool
) -> None:
    """Measure the cells that ``json_file`` does not have yet, and show all."""
    with progress_bar() as progress, PairRun(bundle, settings.target, settings.dtype) as pair:
        run = GridRun(pair, settings, lambda: progress.advance(task))
        measured = CellFile(json_file, run.described())
        missing = [cell for cell in wanted if not measured.is_done(cell, cases(cell), repeat_busy)]
        answers = sum(len(settings.workload(cell).prompts) * len(cases(cell)) for cell in missing)
        task = progress.add_task("answers", total=answers)
        for cell in missing:
            loopback = measured.rows_of(Cell(cell.temperature)) if cell.round_trip_ms is not None else []
            measured.add(cell, run.cell_rows(cell, loopback))
        for cell in wanted:  # predict again: the loopback cell may be newer than the cell
            if rows := measured.rows_of(cell):
                add_predictions(
                    rows, cell, measured.rows_of(Cell(cell.temperature)), pair.model.manifest.target_quality
                )
                measured.add(cell, rows)
    rows = [row for cell in wanted for row in measured.rows_of(cell)]
    Results({}, display_rows(rows)).show(console)
    if predicted := predicted_rows(rows):
        console.print(accuracy_text(predicted))


class GridRun:
    """The cells of a grid, measured by one ``PairRun``.

    Args:
        pair: the draft model and the base station.
        settings: of every cell.
        advance: called after each answer.
    """

    def __init__(self, pair: PairRun, settings: GridSettings, advance: Callable[[], object]) -> None:
        self._pair = pair
        self._settings = settings
        self._advance = advance

    def described(self) -> Row:
        """Everything that the figures of all cells depend on."""
        greedy, sampled = self._settings.greedy, self._settings.sampled
        workloads = {**_described("greedy", greedy), **_described("sampled", sampled)}
        return {**self._pair.described(), **workloads, "downlink_mbit": DOWNLINK_MBIT}

    def cell_rows(self, cell: Cell, loopback: Sequence[Row]) -> list[Row]:
        """Measure a cell: a row per case, with the load average of the last minute.

        Args:
            cell: to measure.
            loopback: the rows of the temperature's loopback cell; without them nothing is predicted.
        """
        quality = self._pair.model.manifest.target_quality
        model = CalibratedModel.of(loopback, quality)
        planned = [_with_draft_len(case, cell, model) for case in cases(cell)]
        measured = self._pair.measure(cell, planned, self._settings.workload(cell), self._advance)
        rows = [case_row(case, cell, combined(measured.answers[case.name])) for case in planned]
        for row in rows:
            row["failed"] = measured.failures.get(str(row["case"]))
            row["load_average"] = os.getloadavg()[0]
        add_predictions(rows, cell, loopback or (rows if cell.round_trip_ms is None else []), quality)
        return rows


def _described(name: str, workload: Workload) -> Row:
    return {
        f"{name}_prompts": len(workload.prompts),
        f"{name}_prompts_hash": sha256("\n".join(workload.prompts).encode()).hexdigest()[:8],
        f"{name}_tokens": workload.limits.tokens,
        f"{name}_answer_seconds": workload.limits.seconds,
    }


def _with_draft_len(case: Case, cell: Cell, model: CalibratedModel) -> Case:
    """The case; ``FULL`` with the draft length that is predicted best."""
    if case is not FULL:
        return case
    predicted = {one: model.predict(Mode.FULL, one, cell) or Prediction(0.0) for one in FULL_DRAFT_LENS}
    return replace(case, draft_len=max(predicted, key=lambda draft_len: predicted[draft_len].speedup))
