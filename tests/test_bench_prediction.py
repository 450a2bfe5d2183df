"""Predictions of the grid: from loopback figures to speedups over a link."""

import random
from collections.abc import Sequence

import pytest

from bench.grid.cells import Cell
from bench.grid.planner_prediction import AcceptanceTrace, VerifiedDraft, planned_throughput
from bench.grid.prediction import CalibratedModel, Calibration
from bench.grid.recording_planner import RoundFigures
from bench.grid.rows import accepted_at_least, add_predictions
from bench.grid.summary import accuracy_text, compare_auto, outliers, predicted_rows, share_within_tolerance
from bench.setup.results import number
from common.round_model import Direction, expected_tokens
from device.planning.planner import Planner
from protocol.messages import Mode
from tests.fakes import QUALITY
from tests.grid_rows import CELL, LOOPBACK, TARGET_SECONDS, rows_of


def speedup(model: CalibratedModel, mode: Mode, draft_len: int | None, cell: Cell) -> float:
    predicted = model.predict(mode, draft_len, cell)
    assert predicted
    return predicted.speedup


def test_predictions_follow_the_round_model_with_loopback_figures() -> None:
    model = CalibratedModel.of(rows_of(LOOPBACK), QUALITY)
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
    assert CalibratedModel.of([], QUALITY).predict(Mode.IDS, 4, cell) is None


def test_nothing_is_predicted_for_a_draft_length_that_no_round_had() -> None:
    calibration = Calibration({8: [0] * 9}, {8: 0.01}, {8: 0.05}, {8: 30.0})
    assert CalibratedModel({Mode.IDS: calibration}, 0.05, QUALITY).predict(Mode.IDS, 8, CELL) is None


def test_a_slower_machine_slows_both_ends_but_not_the_link() -> None:
    model, airtime = CalibratedModel.of(rows_of(LOOPBACK), QUALITY), (20 + 2 * 4) / 125 + 12 / 6.25e6
    slow, cell = model.scaled_to(2 * TARGET_SECONDS), Cell(0.0, 100.0, 0.001)
    seconds = 2 * (0.010 * 4 + 0.050 + 0.002 * 4) + 0.100 + airtime
    expected = expected_tokens(0.8, 4) * 2 * TARGET_SECONDS / seconds
    assert speedup(slow, Mode.IDS, 4, cell) == pytest.approx(expected, rel=1e-4)
    assert model.scaled_to(None) is model
    assert CalibratedModel.of([], QUALITY).scaled_to(1.0).predict(Mode.IDS, 4, cell) is None


def test_a_cell_is_predicted_with_the_speed_of_the_machine_in_that_cell() -> None:
    loopback, rows = rows_of(LOOPBACK), rows_of(CELL)
    rows[0]["tokens_per_second"] = 0.5 / TARGET_SECONDS
    add_predictions(rows, CELL, loopback, QUALITY)
    model = CalibratedModel.of(loopback, QUALITY).scaled_to(2 * TARGET_SECONDS)
    fixed = next(one for one in rows if one["draft_len"] == 4)
    assert fixed["predicted_speedup"] == speedup(model, Mode.IDS, 4, CELL)
    assert fixed["speedup"] == pytest.approx(28.0 * 2 * TARGET_SECONDS)


def test_the_simulated_planner_matches_the_best_fixed_length_and_beats_it_with_telling_margins() -> None:
    times = Calibration({8: [1] * 9}, {8: 0.01}, {8: 0.06}, {8: 1.0}).times(0.05, 0.02, 1e9, Direction())
    without_margins = [VerifiedDraft([None] * 8, accepted) for accepted in (0, 2, 3, 5, 8, 8, 8)]
    with_margins = [
        VerifiedDraft([*[2.0] * one.accepted, 0.05, *[1.0] * 8][:8], one.accepted) for one in without_margins
    ]
    best = max(
        sum(min(one.accepted, draft_len) + 1 for one in without_margins) / 7 * 0.05 / times.seconds(draft_len)
        for draft_len in range(1, 9)
    )
    rng = random.Random(1)  # noqa: S311

    def planned_speedup(rounds: list[VerifiedDraft]) -> float:
        planned = planned_throughput(QUALITY, True, rng.sample(40 * rounds, 280), times)
        return planned.tokens_per_second * TARGET_SECONDS

    assert planned_speedup(without_margins) > 0.93 * best
    assert planned_speedup(with_margins) > 1.05 * best


def test_acceptance_in_a_trace_depends_on_the_position_and_not_on_the_rounds() -> None:
    """Against a sequence whose every token is accepted or not, wherever a draft starts."""
    rng = random.Random(3)  # noqa: S311
    accepts = [rng.random() < 0.8 for _ in range(400)]
    rounds, position = [], 0
    while position + 9 < len(accepts):
        accepted = [*accepts[position : position + 8], False].index(False)
        rounds.append(VerifiedDraft([float(position + one) for one in range(8)], accepted))
        position += accepted + 1
        accepts[position - 1] = accepted == 8  # a bonus token counts as accepted
    trace = AcceptanceTrace(rounds)
    assert trace.length == position
    for start in range(position - 40):
        verified = trace.draft(start, FixedPlanner(20))
        assert len(verified.margins) == 20
        assert verified.accepted == [*accepts[start : start + 20], False].index(False)
        for offset, margin in enumerate(verified.margins[: verified.accepted]):
            assert margin in (start + offset, None)


class FixedPlanner(Planner):
    """Always drafts the same number of tokens."""

    def __init__(self, draft_len: int) -> None:
        super().__init__(QUALITY, greedy=True)
        self._draft_len = draft_len

    def should_continue(self, margins: Sequence[float | None]) -> bool:
        return len(margins) < self._draft_len


def test_reply_times_are_extrapolated_along_the_last_line() -> None:
    calibration = Calibration({4: [1] * 5}, {4: 0.0, 8: 0.0}, {4: 0.060, 8: 0.080}, {4: 1.0, 8: 2.0})
    verify = calibration.times(0.05, 0, 1e9, Direction()).verify_seconds
    assert [verify(draft_len) for draft_len in (0, 4, 6, 12)] == pytest.approx([0.05, 0.06, 0.07, 0.1])


def test_the_constant_part_of_the_drafting_time_counts_once_per_round() -> None:
    per_round, per_token = 0.020, 0.010
    drafting = {draft_len: per_token + per_round / draft_len for draft_len in (2, 4, 200)}
    calibration = Calibration({2: [1] * 3}, drafting, dict.fromkeys(drafting, 0.05), dict.fromkeys(drafting, 1.0))
    times = calibration.times(0.05, 0.0, 1e9, Direction())
    assert [times.seconds(draft_len) for draft_len in (2, 4)] == pytest.approx([0.090, 0.110], rel=1e-3)


def test_accepted_at_least_counts_full_length_rounds() -> None:
    rounds = [RoundFigures((None,) * 3, accepted, 0.01, 0.05) for accepted in (0, 1, 3, 3)]
    shortened = RoundFigures((None,), 1, 0.01, 0.05)
    assert accepted_at_least([*rounds, shortened], 3) == [4, 3, 2, 2]


def test_auto_is_compared_with_the_best_fixed_length_and_the_target_alone() -> None:
    compared = list(compare_auto([*rows_of(CELL), *rows_of(Cell(0.0, 50.0, 1.0), auto=15, best=16)]))
    assert [one.best_draft_len for one in compared] == [4, 2]
    assert [one.share for one in compared] == pytest.approx([30 / 28, 15 / 20.5])
    assert list(compare_auto(rows_of(CELL, auto=None))) == []


def test_the_error_of_an_outlier_is_the_product_of_its_factors() -> None:
    rows = [*rows_of(LOOPBACK), *rows_of(CELL)]
    found = {one.case: one for one in outliers(rows)}
    assert set(found) == {one["case"] for one in predicted_rows(rows) if abs(number(one, "prediction_error")) > 0.1}
    auto, fixed = found["ids, auto"], found["ids, draft length 4"]
    assert (auto.tokens_error, auto.rate_error) == (None, None)
    assert fixed.tokens_error == pytest.approx(2 / 4 - 1)
    assert fixed.tokens_error is not None and fixed.rate_error is not None  # noqa: PT018
    assert (1 + fixed.tokens_error) * (1 + fixed.rate_error) == pytest.approx(1 + fixed.error)


def test_the_target_alone_and_loopback_do_not_count_as_predictions() -> None:
    rows = predicted_rows([*rows_of(CELL), *rows_of(LOOPBACK)])
    names = ["ids, auto", "ids, draft length 2", "ids, draft length 4", "full vocabulary"]
    assert [one["case"] for one in rows] == names
    assert share_within_tolerance(rows) == 0.25
    expected = "25 % of 4 predictions are within 10 % of the measured speedup, all of a cell's in 0 of 1 cells."
    assert accuracy_text(rows) == expected
    assert "in 1 of 2 cells" in accuracy_text([*rows, {**rows[0], "round_trip_ms": 1.0, "prediction_error": -0.1}])
