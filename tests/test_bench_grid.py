"""The grid of speedups: what is kept of it, what is predicted, and what a dead base station leaves."""

import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench.grid import run as grid_run
from bench.grid.cell_file import CellFile
from bench.grid.cells import COLOCATED, FULL, TARGET, Answers, Cell, cases, cells
from bench.grid.planner_prediction import Track, VerifiedDraft, planned_pace
from bench.grid.prediction import Calibration, standing
from bench.grid.recording_client import RecordingClient, RoundFigures
from bench.grid.run import GridRun, GridSettings, Model
from bench.grid.summary import auto_paces, misses, predicted_rows, share_near
from bench.grid.throughput import Length, Pace, measure_pace
from bench.report.report import write_report
from bench.setup.bench_setup import BenchSetup
from bench.setup.results import Results, Row, number
from device.link import Link
from device.planner import Planner
from device.round_model import Direction, expected_tokens
from device.session import DraftSettings
from device.tokenizer import Tokenizer
from protocol.bundle import QualityFigures
from protocol.errors import SettingsError
from protocol.frames import FrameCodec
from protocol.messages import Mode, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table
from tests.link_pair import MemoryTransport, Station
from tests.sample import BUNDLE, SAMPLE

GATE = QualityFigures(argmax_agreement=0.9, overlap=0.8, topk_acceptance=0.7, coupled_acceptance=0.8, positions=100)
CELL = Cell(0.0, 20.0, 5.0)
WHY = Answers(["Why is the sky blue?"], Length(6, 1.0))
TARGET_SECONDS = 0.05


def row(case: str, mode: Mode, draft_len: int | str | None, cell: Cell, tokens_per_second: float | None) -> Row:
    fixed = draft_len if isinstance(draft_len, int) else None
    figures: Row = {
        "tokens": 100,
        "tokens_per_second": tokens_per_second,
        "first_milliseconds": 100.0,
        "acceptance_rate": None,
        "tokens_per_round": fixed and 4.0,
        "draft_milliseconds": 10.0,
        "reply_milliseconds": 50.0 + 2.0 * fixed if fixed else None,
        "uplink_bytes_per_token": 3.0,
        "uplink_bytes_per_round": 20.0 + 2 * fixed if fixed else None,
        "standing": [round(100_000 * 0.8**place) for place in range(draft_len + 1)]
        if isinstance(draft_len, int)
        else None,
        "rounds": 200 * [[float(accepted), *[None] * fixed] for accepted in range(fixed + 1)] if fixed else None,
        "failed": None if tokens_per_second else "the base station died",
        "load_average": 1.0 + (cell.round_trip_ms or 0) / 25,
        "speedup": tokens_per_second * TARGET_SECONDS if tokens_per_second else None,
        "predicted_speedup": 1.0,
        "predicted_tokens_per_round": fixed and 2.0,
        "prediction_error": 1 / (tokens_per_second * TARGET_SECONDS) - 1 if tokens_per_second else None,
    }
    return {"case": case, **cell.columns(), "mode": str(mode), "draft_len": draft_len, **figures}


def rows_of(cell: Cell, auto: float | None = 30.0, best: float = 28.0) -> list[Row]:
    return [
        row(TARGET.name, Mode.TARGET, None, cell, 1 / TARGET_SECONDS),
        row("ids, auto", Mode.IDS, "auto", cell, auto),
        row("ids, 2 a round", Mode.IDS, 2, cell, 20.5),
        row("ids, 4 a round", Mode.IDS, 4, cell, best),
        row("full vocabulary", Mode.FULL, 1, cell, 4.0),
        *([row(COLOCATED, Mode.IDS, "auto", cell, 40.0)] if cell.round_trip_ms is None else []),
    ]


def test_a_grid_begins_each_temperature_without_a_link() -> None:
    wanted = cells([0.0, 1.0], [0.0, 50.0], [1.0, 5.0])
    assert len(wanted) == 10
    assert wanted[0] == Cell(0.0)
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
def test_impossible_cells_are_refused_by_name(name: str, values: tuple[float, float, float]) -> None:
    with pytest.raises(SettingsError, match=f"^{name} is "):
        Cell(*values)


def test_cells_are_kept_as_they_come_and_a_failed_one_is_measured_again(tmp_path: Path) -> None:
    path, settings = tmp_path / "grid.json", {"tokens": 48}
    kept = CellFile(path, settings)
    kept.add(CELL, rows_of(CELL, auto=None))
    kept.add(Cell(0.0), rows_of(Cell(0.0)))
    again = CellFile(path, settings)
    assert again.rows_of(Cell(0.0)) == rows_of(Cell(0.0))
    assert again.is_done(Cell(0.0))
    assert not again.is_done(CELL)
    assert not again.is_done(Cell(1.0))
    again.add(CELL, rows_of(CELL))
    assert CellFile(path, settings).is_done(CELL, quiet=True)
    again.add(CELL, [{**one, "load_average": 3.0} for one in rows_of(CELL)])
    assert CellFile(path, settings).is_done(CELL)
    assert not CellFile(path, settings).is_done(CELL, quiet=True)
    assert len(CellFile(path, settings).results.rows) == 11


def test_a_file_of_other_settings_or_of_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    CellFile(path, {"tokens": 48}).add(CELL, rows_of(CELL))
    with pytest.raises(SettingsError, match=r"^json is "):
        CellFile(path, {"tokens": 32})
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(SettingsError, match="results of edgedraft-bench"):
        CellFile(path, {"tokens": 48})


def test_predictions_are_the_models_with_what_was_measured_without_a_link() -> None:
    model = Model.of(rows_of(Cell(0.0)), GATE)
    assert model.calibrations[Mode.IDS].acceptance(3) == pytest.approx([0.8] * 4, rel=1e-4)
    cell = Cell(0.0, 100.0, 0.001)
    for draft_len in (2, 3, 4):
        airtime = (20 + 2 * draft_len) / 125 + 12 / 6.25e6
        seconds = 0.010 * draft_len + (0.050 + 0.002 * draft_len) + 0.100 + airtime
        expected = expected_tokens(0.8, draft_len) * TARGET_SECONDS / seconds
        assert speedup(model, Mode.IDS, draft_len, cell) == pytest.approx(expected, rel=1e-4)
    assert speedup(model, Mode.IDS, None, cell) == pytest.approx(1, abs=0.05)  # the target alone is best there
    assert speedup(model, Mode.TARGET, None, cell) == 1
    assert model.predict(Mode.TOPK, 4, cell) is None
    assert Model.of([], GATE).predict(Mode.IDS, 4, cell) is None


def test_a_machine_that_slows_down_slows_both_ends_and_no_link() -> None:
    model, airtime = Model.of(rows_of(Cell(0.0)), GATE), (20 + 2 * 4) / 125 + 12 / 6.25e6
    slow, cell = model.at(2 * TARGET_SECONDS), Cell(0.0, 100.0, 0.001)
    seconds = 2 * (0.010 * 4 + 0.050 + 0.002 * 4) + 0.100 + airtime
    expected = expected_tokens(0.8, 4) * 2 * TARGET_SECONDS / seconds
    assert speedup(slow, Mode.IDS, 4, cell) == pytest.approx(expected, rel=1e-4)
    assert model.at(None) is model
    assert Model.of([], GATE).at(1.0).predict(Mode.IDS, 4, cell) is None


@pytest.mark.model
def test_a_cell_is_predicted_with_its_own_speed_of_the_machine() -> None:
    loopback, rows = rows_of(Cell(0.0)), rows_of(CELL)
    rows[0]["tokens_per_second"] = 0.5 / TARGET_SECONDS
    with GridRun(BUNDLE, GridSettings(str(SAMPLE), "bfloat16", WHY, WHY), lambda: None) as run:
        run.compare(rows, CELL, loopback)
        model = Model.of(loopback, run.model.manifest.quality).at(2 * TARGET_SECONDS)
    fixed = next(one for one in rows if one["draft_len"] == 4)
    assert fixed["predicted_speedup"] == speedup(model, Mode.IDS, 4, CELL)
    assert fixed["speedup"] == pytest.approx(28.0 * 2 * TARGET_SECONDS)


def test_above_temperature_0_more_answers_are_measured() -> None:
    other = Answers(["Why?", "What?"], Length(4, 1.0))
    settings = GridSettings(str(SAMPLE), "bfloat16", WHY, other)
    assert settings.answers(Cell(0.0)) is WHY
    assert settings.answers(Cell(0.7, 10.0, 5.0)) is other


def speedup(model: Model, mode: Mode, draft_len: int | None, cell: Cell) -> float:
    predicted = model.predict(mode, draft_len, cell)
    assert predicted
    return predicted.speedup


def test_the_plan_is_predicted_to_do_as_well_as_a_fixed_length_and_better_with_leads_that_tell() -> None:
    times = Calibration({8: [1] * 9}, {8: 0.01}, {8: 0.06}, {8: 1.0}).times(0.05, 0.02, 1e9, Direction())
    blind = [VerifiedDraft([None] * 8, accepted) for accepted in (0, 2, 3, 5, 8, 8, 8)]
    telling = [VerifiedDraft([*[2.0] * one.accepted, 0.05, *[1.0] * 8][:8], one.accepted) for one in blind]
    best = max(
        sum(min(one.accepted, draft_len) + 1 for one in blind) / 7 * 0.05 / times.seconds(draft_len)
        for draft_len in range(1, 9)
    )
    order = random.Random(1)  # noqa: S311

    def speedup(rounds: list[VerifiedDraft]) -> float:
        return planned_pace(GATE, True, order.sample(40 * rounds, 280), times).tokens_per_second * TARGET_SECONDS

    assert speedup(blind) > 0.93 * best
    assert speedup(telling) > 1.05 * best


def test_a_plan_meets_the_tokens_of_its_place_whatever_rounds_they_were_measured_in() -> None:
    """Against a sequence whose every token stands or does not, drafted from anywhere."""
    order = random.Random(3)  # noqa: S311
    stands = [order.random() < 0.8 for _ in range(400)]
    rounds, place = [], 0
    while place + 9 < len(stands):
        accepted = [*stands[place : place + 8], False].index(False)
        rounds.append(VerifiedDraft([float(place + one) for one in range(8)], accepted))
        place += accepted + 1
        stands[place - 1] = accepted == 8  # a bonus token counts as one that would have stood
    track = Track(rounds)
    assert track.length == place
    for begin in range(place - 40):
        judged = track.draft(begin, Drafts(20))
        assert len(judged.margins) == 20
        assert judged.accepted == [*stands[begin : begin + 20], False].index(False)
        for offset, margin in enumerate(judged.margins[: judged.accepted]):
            assert margin in (begin + offset, None)


class Drafts(Planner):
    """A plan of always so many tokens."""

    def __init__(self, draft_len: int) -> None:
        super().__init__(GATE, greedy=True)
        self._draft_len = draft_len

    def should_continue(self, margins: Sequence[float | None]) -> bool:
        return len(margins) < self._draft_len


def test_a_reply_beyond_the_longest_measured_goes_on_along_the_line() -> None:
    calibration = Calibration({4: [1] * 5}, {4: 0.0, 8: 0.0}, {4: 0.060, 8: 0.080}, {4: 1.0, 8: 2.0})
    verify = calibration.times(0.05, 0, 1e9, Direction()).verify_seconds
    assert [verify(draft_len) for draft_len in (0, 4, 6, 12)] == pytest.approx([0.05, 0.06, 0.07, 0.1])


def test_what_drafting_takes_once_a_round_counts_once() -> None:
    per_round, per_token = 0.020, 0.010
    drafting = {draft_len: per_token + per_round / draft_len for draft_len in (2, 4, 200)}
    calibration = Calibration({2: [1] * 3}, drafting, dict.fromkeys(drafting, 0.05), dict.fromkeys(drafting, 1.0))
    times = calibration.times(0.05, 0.0, 1e9, Direction())
    assert [times.seconds(draft_len) for draft_len in (2, 4)] == pytest.approx([0.090, 0.110], rel=1e-3)


def test_standing_counts_rounds_by_how_many_tokens_stood() -> None:
    figures = [RoundFigures((None,) * 3, accepted, 0.01, 0.05) for accepted in (0, 1, 3, 3)] + [
        RoundFigures((None,), 1, 0.01, 0.05)
    ]
    assert standing(Pace(10, 1.0, 0.1, 50, figures), 3) == [4, 3, 2, 2]


def test_auto_is_held_against_the_best_fixed_length_and_the_target_alone() -> None:
    paces = list(auto_paces([*rows_of(CELL), *rows_of(Cell(0.0, 50.0, 1.0), auto=15, best=16)]))
    assert [pace.best_draft_len for pace in paces] == [4, 2]
    assert [pace.share for pace in paces] == pytest.approx([30 / 28, 15 / 20.5])
    assert list(auto_paces(rows_of(CELL, auto=None))) == []


def test_what_a_prediction_misses_is_told_apart() -> None:
    """Tokens of a round and the pace of rounds: together they are the error."""
    rows = [*rows_of(Cell(0.0)), *rows_of(CELL)]
    found = {miss.case: miss for miss in misses(rows)}
    assert set(found) == {one["case"] for one in predicted_rows(rows) if abs(number(one, "prediction_error")) > 0.1}
    auto, fixed = found["ids, auto"], found["ids, 4 a round"]
    assert (auto.tokens, auto.seconds) == (None, None)
    assert fixed.tokens == pytest.approx(2 / 4 - 1)
    assert fixed.tokens is not None and fixed.seconds is not None  # noqa: PT018
    assert (1 + fixed.tokens) * (1 + fixed.seconds) == pytest.approx(1 + fixed.error)


def test_predictions_of_baselines_do_not_count() -> None:
    rows = predicted_rows([*rows_of(CELL), *rows_of(Cell(0.0))])
    assert [one["case"] for one in rows] == ["ids, auto", "ids, 2 a round", "ids, 4 a round", "full vocabulary"]
    assert share_near(rows) == 0.25


def test_a_report_makes_its_folder_and_wants_one_with_results(tmp_path: Path) -> None:
    docs = tmp_path / "new" / "docs"
    with pytest.raises(SettingsError, match=r"results is '.*nowhere'; allowed: a folder with the JSON files"):
        write_report(tmp_path / "nowhere", docs)
    assert not docs.exists()
    assert write_report(tmp_path, docs).read_text(encoding="utf-8").count("Not measured") == 7


def test_the_report_says_what_lost_what_failed_and_what_is_missing(tmp_path: Path) -> None:
    rows = [*rows_of(Cell(0.0)), *rows_of(CELL, auto=None), *rows_of(Cell(0.0, 50.0, 1.0), auto=15.0)]
    Results({"tokens": 48}, rows).write(tmp_path / "speedup.json")
    text = write_report(tmp_path, tmp_path).read_text(encoding="utf-8")
    assert "failed: the base station died" in text
    assert text.count("2.00 (1.00)") == 2  # colocated, in every line
    assert "0.20 (1.00)" in text  # the full vocabulary, which loses
    assert "2 of the 30 cells of the grid were measured" in text
    assert "in 0 of 1 cells; the smallest share is 0.54" in text
    assert "above 2 in 1 of the cells" in text  # that of 50 ms
    assert "| temperature 0, 50 ms, 1 Mbit/s | ids, 4 a round | -29 % | -50 % | +43 % |" in text
    assert text.count("Not measured.") == 5  # theory, link, uplink, capacity and churn have no files
    assert (tmp_path / "plots" / "speedup_0.svg").exists()


@pytest.fixture
def memory_place() -> BenchSetup:
    table = random_table(30, seed=1)
    station = Station(FakeTarget.make(table))
    model = FakeDraftModel.make(blend(table, random_table(30, seed=2), 0.9))
    link = Link(MemoryTransport(station), FrameCodec(30), "memory")
    tokenizer: Tokenizer = object()  # type: ignore[assignment]
    return BenchSetup(model, tokenizer, link, RecordingClient(link, model.manifest))


@pytest.mark.parametrize(("mode", "draft_len"), [(Mode.TARGET, None), (Mode.IDS, 4), (Mode.IDS, None)])
def test_a_pace_counts_whole_rounds_behind_the_first(
    memory_place: BenchSetup, mode: Mode, draft_len: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr("bench.grid.throughput.time.monotonic", lambda: float(next(ticks)))
    settings = DraftSettings(mode, Sampling(), uplink_k=1, draft_len=draft_len)
    pace = measure_pace(memory_place, [3, 1, 4], settings, Length(40, 1e9))
    assert 40 <= pace.tokens < 40 + 33
    if draft_len:
        assert pace.tokens == sum(one.accepted + 1 for one in pace.rounds)
        assert pace.seconds == len(pace.rounds)
    short = measure_pace(memory_place, [3, 1, 4], settings, Length(40, 2.0))
    assert short.tokens < pace.tokens


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> Callable[[GridRun], None]:
    """Kill the base station when the next answer is measured."""

    def plan(run: GridRun) -> None:
        def kill_then_measure(place: BenchSetup, ids: list[int], settings: DraftSettings, length: Length) -> Pace:
            assert run._station is not None
            if length is not grid_run.WARM_UP and run._station.alive:
                os.kill(run._station.process.pid, signal.SIGKILL)
                run._station.process.wait()
            return measure_pace(place, ids, settings, length)

        monkeypatch.setattr(grid_run, "measure_pace", kill_then_measure)

    return plan


@pytest.mark.model
def test_a_base_station_that_dies_fails_its_cell_and_the_next_is_measured(
    killing: Callable[[GridRun], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.fail("needs two cores, as the command says itself")
    monkeypatch.setattr("bench.recording._GIVE_UP_SECONDS", 2.0)
    chosen = [TARGET, replace(FULL, draft_len=1), *[case for case in cases(CELL) if case.name == "ids, 4 a round"]]
    monkeypatch.setattr(grid_run, "cases", lambda _: chosen)
    settings = GridSettings(str(SAMPLE), "bfloat16", WHY, WHY)
    with GridRun(BUNDLE, settings, lambda: None) as run:
        with monkeypatch.context():
            killing(run)
            dead = run.cell_rows(CELL, [])
        monkeypatch.setattr(grid_run, "measure_pace", measure_pace)
        alive = run.cell_rows(Cell(0.0, 10.0, 50.0), [])
    assert {one["failed"] for one in dead} == {"the base station died"}
    assert {one["failed"] for one in alive} == {None}
    assert [one["case"] for one in dead] == [one["case"] for one in alive] == [case.name for case in chosen]
    assert all(one["speedup"] for one in alive)
