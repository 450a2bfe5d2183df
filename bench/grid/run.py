"""Measures the cells of a grid one after the other, each row beside its prediction."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import typer

from bench.grid.cell_file import CellFile
from bench.grid.cells import (
    DOWNLINK_MBIT,
    FULL,
    FULL_DRAFT_LENS,
    ROUND_TRIPS_MS,
    TARGET,
    TEMPERATURES,
    UPLINKS_MBIT,
    AnswerLimits,
    Case,
    Cell,
    Workload,
    cases,
    cells,
)
from bench.grid.prediction import CalibratedModel, Prediction
from bench.grid.recording_planner import RecordingPlanners
from bench.grid.rows import add_predictions, case_row
from bench.grid.summary import display_rows
from bench.grid.throughput import Throughput, combined, measure_throughput
from bench.link.relay import relay_command
from bench.setup.bench_setup import BenchSetup, connected
from bench.setup.cores import Cores, running_on
from bench.setup.options import (
    BundleOption,
    DtypeOption,
    JsonOption,
    PromptsOption,
    TargetOption,
    console,
    progress_bar,
)
from bench.setup.prompts import read_prompts
from bench.setup.results import Results, Row
from bench.setup.server_process import Served, serving
from bench.setup.station_process import station_command
from device.draft_model import DraftModel
from device.settings import DEFAULT_UPLINK_K, DraftSettings, Timeouts
from device.tokenizer import Tokenizer
from protocol.errors import EdgedraftError
from protocol.messages import Mode, Sampling

WARM_UP = AnswerLimits(24, 4.0)
_RETRY_SECONDS = 20.0


def grid(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    prompts: PromptsOption = None,
    count: Annotated[
        int | None, typer.Option(help="Number of prompts. Default: 3 at temperature 0, 20 above it.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens per answer. Default: 64 at temperature 0, 32 above it.")
    ] = None,
    answer_seconds: Annotated[
        float | None,
        typer.Option(help="Longest time per answer, but at least two rounds. Default: 3 at temperature 0, 2 above it."),
    ] = None,
    temperatures: Annotated[
        list[float] | None, typer.Option("--temperature", help="Repeatable. Default: 0 and 1.")
    ] = None,
    round_trips: Annotated[
        list[float] | None, typer.Option("--round-trip-ms", help="Repeatable. Default: 0, 10, 20, 50 and 100.")
    ] = None,
    uplinks: Annotated[
        list[float] | None, typer.Option("--uplink-mbit", help="Repeatable. Default: 1, 5 and 50.")
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
    with progress_bar() as progress, GridRun(bundle, settings, lambda: progress.advance(task)) as run:
        measured = CellFile(json_file, run.described())
        missing = [cell for cell in wanted if not measured.is_done(cell, repeat_busy)]
        answers = sum(len(settings.workload(cell).prompts) * len(cases(cell)) for cell in missing)
        task = progress.add_task("answers", total=answers)
        for cell in missing:
            loopback = measured.rows_of(Cell(cell.temperature)) if cell.round_trip_ms is not None else []
            measured.add(cell, run.cell_rows(cell, loopback))
        for cell in wanted:  # predict again: the loopback cell may be newer than the cell
            if rows := measured.rows_of(cell):
                add_predictions(rows, cell, measured.rows_of(Cell(cell.temperature)), run.model.manifest.quality)
                measured.add(cell, rows)
    Results({}, display_rows([row for cell in wanted for row in measured.rows_of(cell)])).show(console)


class GridRun:
    """The draft model on one core and a base station on another, restarted if it dies.

    Args:
        bundle: of the draft model.
        settings: of every cell.
        advance: called after each prompt of a case.

    Raises:
        SettingsError: the machine has only one core.
    """

    def __init__(self, bundle: Path, settings: GridSettings, advance: Callable[[], object]) -> None:
        self.model = DraftModel(bundle, threads=1)
        self._cores = Cores.choose()
        self._tokenizer = Tokenizer(bundle, self.model.manifest)
        self._settings = settings
        self._advance = advance
        self._stack = ExitStack()
        self._station: Served | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def described(self) -> Row:
        """Everything that the figures of all cells depend on."""
        manifest, settings = self.model.manifest, self._settings
        return {
            "target": Path(settings.target).name,
            "target_dtype": settings.dtype,
            "draft": manifest.name,
            "draft_precision": manifest.precision,
            **_described("greedy", settings.greedy),
            **_described("sampled", settings.sampled),
            "downlink_mbit": DOWNLINK_MBIT,
            "cores": "one for the device, one for the base station",
        }

    def cell_rows(self, cell: Cell, loopback: Sequence[Row]) -> list[Row]:
        """Measure a cell: a row per case, with the load average of the last minute.

        Args:
            cell: to measure.
            loopback: the rows of the temperature's loopback cell; without them nothing is predicted.
        """
        quality = self.model.manifest.quality
        model = CalibratedModel.of(loopback, quality)
        planned = [_with_draft_len(case, cell, model) for case in cases(cell)]
        measured, failures = self._measure_cell(cell, planned)
        rows = [case_row(case, cell, combined(measured[case.name])) for case in planned]
        for row in rows:
            row["failed"] = failures.get(str(row["case"]))
            row["load_average"] = os.getloadavg()[0]
        add_predictions(rows, cell, loopback or (rows if cell.round_trip_ms is None else []), quality)
        return rows

    def _measure_cell(
        self, cell: Cell, planned: Sequence[Case]
    ) -> tuple[Mapping[str, list[Throughput]], Mapping[str, str]]:
        """Each case's answers, the cases taking turns on each prompt, and why the failed cases failed."""
        measured: dict[str, list[Throughput]] = {case.name: [] for case in planned}
        failures: dict[str, str] = {}
        with running_on(self._cores.device), ExitStack() as stack:
            try:
                station = self._running_station()
                address = stack.enter_context(self._linked(cell, station.address))
                setup = stack.enter_context(self._connected(address))
                self._warm_up(setup, cell, planned)
                for prompt in self._settings.workload(cell).prompts:
                    for case in planned:
                        if case.name not in failures and station.alive:
                            self._measure(setup, cell, case, prompt, measured[case.name], failures)
                        self._advance()
                if not station.alive:
                    failures = dict.fromkeys(measured, "the base station died")
            except EdgedraftError as error:
                failures = dict.fromkeys(measured, str(error))
        return measured, failures

    def _measure(
        self,
        setup: BenchSetup,
        cell: Cell,
        case: Case,
        prompt: str,
        measured: list[Throughput],
        failures: dict[str, str],
    ) -> None:
        ids, settings = setup.prompt_ids(prompt), _draft_settings(case, cell)
        limits = self._settings.workload(cell).limits
        try:
            if case.colocated:
                with running_on(self._cores.station), self._connected(self._running_station().address) as colocated:
                    measure_throughput(colocated, ids, settings, WARM_UP)
                    measured.append(measure_throughput(colocated, ids, settings, limits))
            else:
                measured.append(measure_throughput(setup, ids, settings, limits))
        except EdgedraftError as error:
            failures[case.name] = str(error)

    def _warm_up(self, setup: BenchSetup, cell: Cell, planned: Sequence[Case]) -> None:
        """Run the first forward passes, which are slow, and let each planner measure its link."""
        ids = setup.prompt_ids(self._settings.workload(cell).prompts[0])
        for case in planned:
            if case is TARGET or (case.draft_len is None and not case.colocated):
                measure_throughput(setup, ids, _draft_settings(case, cell), WARM_UP)

    def _running_station(self) -> Served:
        if self._station is None or not self._station.alive:
            command = station_command(self._settings.target, self._settings.dtype)
            self._station = self._stack.enter_context(serving(command, self._cores.station))
        return self._station

    @contextmanager
    def _linked(self, cell: Cell, address: str) -> Iterator[str]:
        """The address of the base station at the device's end of the cell's link."""
        if cell.round_trip_ms is None:
            yield address
            return
        with serving(relay_command(address, cell.up, cell.down), self._cores.device) as relay:
            yield relay.address

    @contextmanager
    def _connected(self, address: str) -> Iterator[BenchSetup]:
        planners = RecordingPlanners(self.model.manifest.quality)
        with connected(self.model, self._tokenizer, address, planners, Timeouts(retry=_RETRY_SECONDS)) as setup:
            yield setup


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


def _draft_settings(case: Case, cell: Cell) -> DraftSettings:
    uplink_k, sampling = DEFAULT_UPLINK_K.get(case.mode, 1), Sampling(cell.temperature, seed=1)
    return DraftSettings(case.mode, sampling, uplink_k, case.draft_len, cache_last_token=not case.colocated)
