"""The planner on links of many round trips, with draft models of all qualities, in simulated time."""

from dataclasses import replace

import pytest

from device.settings import DraftSettings
from protocol.messages import Draft, Mode, Sampling
from tests.planner_grid import LOCKSTEP, PLANNED, ROUND_TRIPS, SAMPLE, SLOW_TARGET, TARGET_ALONE, GridCell, GridPair
from tests.timed_pair import PairTimes

FAR = replace(SAMPLE, round_trip=0.1)
CELLS = [
    *((SAMPLE, 0.95, round_trip) for round_trip in ROUND_TRIPS),
    *((SLOW_TARGET, 0.85, round_trip) for round_trip in ROUND_TRIPS),
    *((SAMPLE, acceptance, 0.1) for acceptance in (0.3, 0.7)),
]


@pytest.mark.parametrize(("speeds", "acceptance", "round_trip"), CELLS)
def test_planned_drafts_ahead_are_near_the_best_setting(
    speeds: PairTimes, acceptance: float, round_trip: float
) -> None:
    """``python -m tests.planner_grid`` has all cells."""
    assert not GridCell.measure(acceptance, replace(speeds, round_trip=round_trip)).faults


@pytest.mark.parametrize("round_trip", ROUND_TRIPS)
def test_a_draft_model_that_is_always_wrong_costs_a_first_answer_little(round_trip: float) -> None:
    """The bundle's quality check says that it is always right."""
    times = replace(SAMPLE, round_trip=round_trip)
    planned, alone = (GridPair(0.0, times).answer_seconds(settings, 96)[0] for settings in (PLANNED, TARGET_ALONE))
    assert planned < 1.05 * alone


def test_guesses_teach_the_acceptance_while_the_target_decodes_alone() -> None:
    grid = GridPair(0.7, FAR)
    grid.answer_seconds(PLANNED, 110)
    assert not any(isinstance(message, Draft) for message in grid.pair.sent)
    planner = grid.pair.planners.for_settings(PLANNED, grid.pair.client.welcome)
    assert 0.3 < planner.alpha < 0.9  # the last tokens count most, and may be hard ones
    assert planner.times.draft_seconds == pytest.approx(FAR.draft)
    assert planner.explanation.startswith("the target alone: α 0.")
    assert planner.figures is not None
    assert planner.figures.acceptance == planner.alpha


def test_an_assumed_bonus_token_counts_in_no_time_to_draft_a_token() -> None:
    grid = GridPair(0.95, replace(SAMPLE, round_trip=0.02))
    for _ in range(3):
        grid.answer_seconds(PLANNED, 96)
    planner = grid.pair.planners.for_settings(PLANNED, grid.pair.client.welcome)
    assert planner.times.draft_seconds == pytest.approx(SAMPLE.draft, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "guesses"),
    [
        (PLANNED, True),
        (replace(PLANNED, mode=Mode.COUPLED, sampling=Sampling(1.0)), True),
        (replace(PLANNED, mode=Mode.TOPK, uplink_k=4), True),
        (replace(PLANNED, mode=Mode.TOPK, uplink_k=4, sampling=Sampling(1.0)), False),
        (replace(PLANNED, draft_len=4), False),
        (LOCKSTEP, False),
        (TARGET_ALONE, False),
    ],
)
def test_the_draft_model_guesses_where_that_teaches_and_does_not_slow_the_target(
    settings: DraftSettings, guesses: bool
) -> None:
    """With one Draft at a time both models may share their cores."""
    pair = GridPair(0.7, FAR).pair
    pair.session(settings, [3, 1, 4])
    assert pair.planners.for_settings(settings, pair.client.welcome).guesses is guesses
