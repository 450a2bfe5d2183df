"""A pause of the device, of the link or of the reader changes no estimate much; a change that lasts does."""

from collections.abc import Callable

import pytest

from device.planning.planner import Planner
from device.planning.trials import TRIAL
from tests.fakes import QUALITY

PAUSE = 10.0


def open_and_decode(planner: Planner, pause: float) -> None:
    """Begin a session whose prompt the base station still runs when the target begins to decode."""
    planner.observe_opened(0.1 + pause)
    planner.observe_decoded(TRIAL, None, 0.12)


STEPS: dict[str, Callable[[Planner, float], None]] = {
    "draft": lambda planner, pause: planner.observe([None] * 4, 3, 0.016 + pause, 0.164, 0.180 + pause),
    "reply": lambda planner, pause: planner.observe([None] * 4, 3, 0.016, 0.164 + pause, 0.180 + pause),
    "round": lambda planner, pause: planner.observe([None] * 4, 3, 0.016, None, 0.180 + pause),
    "guess": lambda planner, pause: planner.observe_guess(2.0, True, 0.004 + pause),
    "target": lambda planner, pause: planner.observe_decoded(TRIAL, 0.16, 0.12 + pause),
    "first token": lambda planner, pause: planner.observe_decoded(TRIAL, 0.16 + pause, 0.12),
    "prefill": lambda planner, pause: planner.observe_prefill(16, 0.032 + pause),
    "target prefill": lambda planner, pause: planner.observe_target_prefill(100, 0.36 + pause),
    "opening": open_and_decode,
}
FIGURES = {"guess": "draft", "first token": "reply", "opening": "reply"}
"""The figure that a step changes, where it has another name."""

every_step = pytest.mark.parametrize("step", STEPS)


def warm_planner() -> Planner:
    """Drafts, and has seen each step many times."""
    planner = Planner(QUALITY, greedy=False)
    planner.observe_opened(0.1)
    for _ in range(30):
        for observe in STEPS.values():
            observe(planner, 0.0)
    assert planner.decode_len() == 0
    return planner


def figures(planner: Planner) -> dict[str, float]:
    """All that the planner decides from, in seconds but for the tokens until the target is tried alone again."""
    times, known, estimates = planner.times, planner.figures, vars(planner)["_estimates"]
    assert known is not None
    return {
        "draft": times.draft_seconds,
        "reply": times.round_trip_seconds + times.verify_seconds(4),
        "round": 1 / planner.tokens_per_second,
        "target": times.target_seconds(),
        "prefill": known.prefill_seconds,
        "target prefill": estimates.target_prefill_token_seconds,
        "wait": known.wait,
    }


@every_step
def test_one_pause_changes_no_figure_much(step: str) -> None:
    planner = warm_planner()
    before = figures(planner)
    STEPS[step](planner, PAUSE)
    assert planner.decode_len() == 0
    for name, value in figures(planner).items():
        assert before[name] / 3 < value < 3 * before[name], name


@every_step
def test_a_change_that_lasts_is_learnt_within_ten_observations(step: str) -> None:
    planner = warm_planner()
    name = FIGURES.get(step, step)
    before = figures(planner)[name]
    for _ in range(10):
        STEPS[step](planner, PAUSE)
    assert figures(planner)[name] > 5 * before
