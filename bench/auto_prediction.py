"""What ``--draft-len auto`` is predicted to gain: the live plan itself, over times of the model and measured tokens.

Rounds of a long fixed draft length say what drafted tokens are like: how far
each led, and how many of a round stood. The plan meets such rounds again, drawn
at random, at the times that the model gives the link.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from device.live_planner import LivePlanner
from device.planner import RoundTimes
from protocol.bundle import GateFigures

TOKENS = 4000


@dataclass(frozen=True)
class JudgedRound:
    """The leads of its drafted tokens, None where there is none to know, and how many of them stood."""

    leads: Sequence[float | None]
    accepted: int


def auto_speedup(
    gate: GateFigures, greedy: bool, rounds: Sequence[JudgedRound], times: RoundTimes, seed: int = 1
) -> float:
    """Tokens a second of the plan against the target alone.

    Args:
        gate: figures of the draft model, which the plan begins with.
        greedy: whether the temperature is 0.
        rounds: to draw from.
        times: of a round.
        seed: of the drawing.
    """
    chance, planner = random.Random(seed), LivePlanner(gate, greedy)  # noqa: S311 - a simulation
    pace = times.target_seconds()
    tokens, seconds = 0, 0.0
    while tokens < TOKENS:
        if count := planner.decode_len():
            first, further = times.round_trip_seconds + pace, (count - 1) * pace
            planner.observe_decoded(count, first, further)
            tokens, seconds = tokens + count, seconds + first + further
            continue
        leads, accepted = _round(chance, planner, rounds)
        drafting = len(leads) * times.draft_seconds
        reply = times.seconds(len(leads)) - drafting
        planner.observe(leads, accepted, drafting, reply)
        tokens, seconds = tokens + accepted + 1, seconds + drafting + reply
    return tokens * pace / seconds


def _round(
    chance: random.Random, planner: LivePlanner, rounds: Sequence[JudgedRound]
) -> tuple[list[float | None], int]:
    """Leads of the tokens that the plan drafts, and how many stand; where all do, another round goes on."""
    leads: list[float | None] = []
    accepted = 0
    while True:
        drawn = chance.choice(rounds)
        begin = len(leads)
        for lead in drawn.leads:
            if not planner.goes_on(leads):
                break
            leads.append(lead)
        standing = accepted == begin
        accepted += min(drawn.accepted, len(leads) - begin) if standing else 0
        if len(leads) < begin + len(drawn.leads) or not planner.goes_on(leads):
            return leads, accepted
