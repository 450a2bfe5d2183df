"""The slower way is tried as rarely as its cost demands; speeds are given, nothing is estimated."""

from dataclasses import replace

import pytest

from device.planning.trials import MIN_WAIT, TRIAL, TRIAL_SHARE, Speeds, Trials

FAST = Speeds(
    tokens_per_second=100.0,
    speedup=2.0,
    drafting_is_slower=False,
    rounds_seen=100,
    guesses=False,
    target_seconds=0.02,
    reply_seconds=1.0,
    round_trip_seconds=0.5,
    predicted_round=(4.0, 0.4),
)
SLOW = replace(FAST, tokens_per_second=25.0, speedup=0.5)


def in_way(alone: bool) -> Trials:
    trials = Trials()
    trials.start(alone, since=MIN_WAIT, wait=MIN_WAIT)
    return trials


@pytest.mark.parametrize(
    ("alone", "speeds", "lost", "share"),
    [
        (False, FAST, 1.0 * 100 - TRIAL, 1 / 100),
        (True, SLOW, 1.0 * 50 - TRIAL, TRIAL_SHARE),
        (True, replace(SLOW, guesses=True), 1.5 * 50 - TRIAL, 0.5 / 100),
    ],
    ids=["the target alone", "drafting", "drafting, with guesses"],
)
def test_a_trial_of_the_slower_way_costs_at_most_its_share(
    alone: bool, speeds: Speeds, lost: float, share: float
) -> None:
    trials = in_way(alone)
    trials.review(speeds, was_alone=not alone, tokens=TRIAL, seconds=1.0)
    assert (trials.alone, trials.since, trials.wait) == (alone, 0, round(lost / share))


def test_with_guesses_the_first_trial_after_a_switch_is_planned_from_the_prediction() -> None:
    trials = in_way(alone=False)
    trials.review(SLOW, was_alone=False, tokens=5, seconds=0.1)
    assert (trials.alone, trials.wait) == (True, MIN_WAIT)
    trials = in_way(alone=False)
    trials.review(replace(SLOW, guesses=True), was_alone=False, tokens=5, seconds=0.1)
    assert (trials.alone, trials.wait) == (True, round((0.9 * 50 - 4) / (0.5 / 100)))
