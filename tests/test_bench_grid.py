"""The grid of links: its cells, its result file, its measurements, and a base station that dies."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.grid import pair_run
from bench.grid import run as grid_run
from bench.grid.cell_file import CellFile
from bench.grid.cells import COLOCATED, FULL, TARGET, AnswerLimits, Case, Cell, Workload, cases, cells
from bench.grid.pair_run import PairRun
from bench.grid.recording_planner import RecordingPlanners
from bench.grid.run import GridRun, GridSettings
from bench.grid.throughput import Throughput, measure_throughput
from bench.setup.bench_setup import BenchSetup
from bench.setup.results import Results, machine, versions
from device.link.link import Link
from device.session.client import Client
from device.settings import DraftSettings
from device.text.tokenizer import Tokenizer
from protocol.errors import SettingsError
from protocol.frames import FrameCodec
from protocol.messages import Mode, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table
from tests.grid_rows import CELL, LOOPBACK, rows_of
from tests.link_pair import MemoryTransport, Station
from tests.sample import BUNDLE, SAMPLE

WORKLOAD = Workload(["Why is the sky blue?"], AnswerLimits(6, 1.0))


def test_each_temperature_starts_with_its_loopback_cell() -> None:
    wanted = cells([0.0, 1.0], [0.0, 50.0], [1.0, 5.0])
    assert len(wanted) == 10
    assert wanted[0] == LOOPBACK
    assert wanted[5] == Cell(1.0)
    for cell in wanted:
        names = [case.name for case in cases(cell)]
        assert names[0] == TARGET.name
        assert len(set(names)) == len(names)
        assert (COLOCATED in names) == (cell.round_trip_ms is None)


@pytest.mark.parametrize(
    ("name", "values"),
    [("temperature", (-1.0, 0.0, 5.0)), ("round_trip_ms", (0.0, -1.0, 5.0)), ("uplink_mbit", (0.0, 10.0, 0.0))],
)
def test_invalid_cells_are_refused_by_name(name: str, values: tuple[float, float, float]) -> None:
    with pytest.raises(SettingsError, match=f"^{name} is "):
        Cell(*values)


def cases_of(cell: Cell) -> list[Case]:
    """The cases of the made-up rows."""
    return [Case(str(row["case"]), Mode.IDS) for row in rows_of(cell)]


def test_an_interrupted_grid_continues_and_failed_cells_are_measured_again(tmp_path: Path) -> None:
    path, settings = tmp_path / "grid.json", {"tokens": 48}
    first = CellFile(path, settings)
    first.add(CELL, rows_of(CELL, auto=None))
    first.add(LOOPBACK, rows_of(LOOPBACK))
    second = CellFile(path, settings)
    assert second.rows_of(LOOPBACK) == rows_of(LOOPBACK)
    assert second.is_done(LOOPBACK, cases_of(LOOPBACK))
    assert not second.is_done(CELL, cases_of(CELL))
    assert not second.is_done(Cell(1.0), cases_of(LOOPBACK))
    second.add(CELL, rows_of(CELL))
    assert CellFile(path, settings).is_done(CELL, cases_of(CELL), quiet=True)
    second.add(CELL, [{**one, "load_average": 3.0} for one in rows_of(CELL)])
    assert CellFile(path, settings).is_done(CELL, cases_of(CELL))
    assert not CellFile(path, settings).is_done(CELL, cases_of(CELL), quiet=True)
    assert len(CellFile(path, settings).results.rows) == 11


def test_a_cell_that_was_measured_in_other_cases_is_measured_again() -> None:
    file, wanted = CellFile(None, {}), cases_of(CELL)
    file.add(CELL, rows_of(CELL)[:-1])
    assert not file.is_done(CELL, wanted)
    file.add(CELL, rows_of(CELL))
    assert file.is_done(CELL, wanted)
    assert not file.is_done(CELL, wanted[:-1])


@pytest.mark.parametrize(
    ("other", "allowed"),
    [
        ({"machine": {**machine(), "processor": "other"}}, "one measured on this machine"),
        ({"versions": {**versions(), "torch": "1.0"}}, "one measured with .*'torch': '[2-9]"),
    ],
    ids=["machine", "versions"],
)
def test_a_file_that_was_measured_elsewhere_is_refused(other: dict[str, Any], allowed: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    Results({"tokens": 48}, rows_of(CELL), **other).write(path)
    with pytest.raises(SettingsError, match=allowed):
        CellFile(path, {"tokens": 48})


def test_a_file_with_other_settings_or_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    CellFile(path, {"tokens": 48}).add(CELL, rows_of(CELL))
    with pytest.raises(SettingsError, match=r"^json is "):
        CellFile(path, {"tokens": 32})
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(SettingsError, match="results of edgedraft-bench"):
        CellFile(path, {"tokens": 48})


def test_the_workload_depends_on_the_temperature() -> None:
    sampled = Workload(["Why?", "What?"], AnswerLimits(4, 1.0))
    settings = GridSettings(str(SAMPLE), "bfloat16", WORKLOAD, sampled)
    assert settings.workload(LOOPBACK) is WORKLOAD
    assert settings.workload(Cell(0.7, 10.0, 5.0)) is sampled


@pytest.fixture
def memory_setup() -> BenchSetup:
    table = random_table(30, seed=1)
    station = Station(FakeTarget.make(table))
    model = FakeDraftModel.make(blend(table, random_table(30, seed=2), 0.9))
    link = Link(MemoryTransport(station), FrameCodec(30), "memory")
    tokenizer: Tokenizer = object()  # type: ignore[assignment]
    return BenchSetup(model, tokenizer, Client(link, model.manifest), RecordingPlanners(model.manifest.quality))


@pytest.mark.parametrize(("mode", "draft_len"), [(Mode.TARGET, None), (Mode.IDS, 4), (Mode.IDS, None)])
def test_throughput_counts_whole_rounds_after_the_first_tokens(
    memory_setup: BenchSetup, mode: Mode, draft_len: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr("bench.grid.throughput.time.monotonic", lambda: float(next(ticks)))
    settings = DraftSettings(mode, Sampling(), uplink_k=1, draft_len=draft_len)
    measured = measure_throughput(memory_setup, [3, 1, 4], settings, AnswerLimits(40, 1e9))
    assert 40 <= measured.tokens < 40 + 33
    if draft_len:
        assert measured.tokens == sum(one.accepted + 1 for one in measured.rounds)
        assert measured.seconds == len(measured.rounds) == measured.verdicts
    assert 1 <= measured.first_tokens <= 1 + (draft_len or 4)
    tokens, seconds = measured.tokens + measured.first_tokens, measured.ttft_seconds + measured.seconds
    assert measured.tokens_per_second_with_prompt == tokens / seconds
    short = measure_throughput(memory_setup, [3, 1, 4], settings, AnswerLimits(40, 2.0))
    assert short.tokens < measured.tokens


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> Callable[[PairRun], None]:
    """Kill the base station when the next answer is measured."""

    def plan(pair: PairRun) -> None:
        def kill_then_measure(
            setup: BenchSetup, ids: list[int], settings: DraftSettings, limits: AnswerLimits
        ) -> Throughput:
            assert pair._station is not None
            if limits is not pair_run.WARM_UP and pair._station.alive:
                os.kill(pair._station.process.pid, signal.SIGKILL)
                pair._station.process.wait()
            return measure_throughput(setup, ids, settings, limits)

        monkeypatch.setattr(pair_run, "measure_throughput", kill_then_measure)

    return plan


@pytest.mark.model
def test_a_dead_base_station_fails_its_cell_and_is_restarted_for_the_next(
    killing: Callable[[PairRun], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.fail("needs two cores, as the command does")
    monkeypatch.setattr(pair_run, "_RETRY_SECONDS", 2.0)
    chosen = [TARGET, replace(FULL, draft_len=1), *[one for one in cases(CELL) if one.name == "ids, draft length 4"]]
    monkeypatch.setattr(grid_run, "cases", lambda _: chosen)
    settings = GridSettings(str(SAMPLE), "bfloat16", WORKLOAD, WORKLOAD)
    with PairRun(BUNDLE, settings.target, settings.dtype) as pair:
        run = GridRun(pair, settings, lambda: None)
        with monkeypatch.context():
            killing(pair)
            dead = run.cell_rows(CELL, [])
        monkeypatch.setattr(pair_run, "measure_throughput", measure_throughput)
        alive = run.cell_rows(Cell(0.0, 10.0, 50.0), [])
    assert {one["failed"] for one in dead} == {"the base station died"}
    assert {one["failed"] for one in alive} == {None}
    assert [one["case"] for one in dead] == [one["case"] for one in alive] == [case.name for case in chosen]
    assert all(one["speedup"] for one in alive)
