"""What ``--draft-len auto`` is predicted to gain: the live plan itself, over times of the model and measured tokens.

Where ids alone are sent, whether a drafted token stands is settled by its place
in the answer, whatever the rounds before were. So rounds of a long fixed draft
length, in their order, are a *track* on which any other plan can be run: at
every place it says how the drafted token led and whether it stood. In other
modes a round may fall differently, and the track is one that might have been.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from device.planner import Planner
from device.round_model import RoundTimes
from protocol.bundle import QualityFigures

_WARM_UP = 24


@dataclass(frozen=True)
class VerifiedDraft:
    """The margins of its drafted tokens, None where there is none to know, and how many of them stood."""

    margins: Sequence[float | None]
    accepted: int


class Track:
    """Rounds of one draft length after the other, so that a round may begin at any of their tokens.

    Args:
        rounds: in order; what followed the last one's tokens is taken to be the first one's.
    """

    def __init__(self, rounds: Sequence[VerifiedDraft]) -> None:
        self._rounds = rounds
        self._begins = list(accumulate((one.accepted + 1 for one in rounds), initial=0))
        self.length = self._begins.pop()
        self._round_at = [index for index, one in enumerate(rounds) for _ in range(one.accepted + 1)]

    def draft(self, place: int, planner: Planner) -> VerifiedDraft:
        """What the plan drafts at a place, and how many of it stand.

        The token behind a round that stood whole was the target's own, with no margin known; it counts as one that
        would have stood. Behind a rejected token drafts go on as they did, and then as in the rounds that follow.
        """
        margins: list[float | None] = []
        accepted, standing = 0, True
        index = self._round_at[place % self.length]
        offset = place % self.length - self._begins[index]
        while planner.should_continue(margins):
            judged = self._rounds[index]
            margins.append(judged.margins[offset] if offset < len(judged.margins) else None)
            standing = standing and (offset < judged.accepted or offset == len(judged.margins))
            accepted += standing
            offset += 1
            if offset >= len(judged.margins) + (judged.accepted == len(judged.margins)):
                index, offset = (index + 1) % len(self._rounds), 0
        return VerifiedDraft(margins, accepted)


@dataclass(frozen=True)
class PlannedPace:
    """What a plan comes to: tokens a second, and tokens of a round in which something was drafted."""

    tokens_per_second: float
    tokens_per_round: float | None


def planned_pace(
    quality: QualityFigures, greedy: bool, rounds: Sequence[VerifiedDraft], times: RoundTimes
) -> PlannedPace:
    """The pace of the live plan, once around the track behind a warm-up.

    Args:
        quality: figures of the draft model, which the plan begins with.
        greedy: whether the temperature is 0.
        rounds: of a fixed draft length, one and more.
        times: of a round.
    """
    track, planner, pace = Track(rounds), Planner(quality, greedy), times.target_seconds()
    planner.observe_opened(times.round_trip_seconds)
    place, seconds, begin = 0, 0.0, (0, 0.0)
    round_tokens: list[int] = []
    while place - begin[0] < track.length:
        if count := planner.decode_len():
            first, further = times.round_trip_seconds + pace, (count - 1) * pace
            planner.observe_decoded(count, first, further)
            place, seconds = place + count, seconds + first + further
        else:
            judged = track.draft(place, planner)
            drafting = len(judged.margins) * times.draft_seconds
            reply = times.seconds(len(judged.margins)) - drafting
            planner.observe(judged.margins, judged.accepted, drafting, reply)
            round_tokens.append(judged.accepted + 1)
            place, seconds = place + judged.accepted + 1, seconds + drafting + reply
        if place >= _WARM_UP and not begin[0]:
            begin = place, seconds
            round_tokens.clear()
    tokens_per_second = (place - begin[0]) / (seconds - begin[1])
    return PlannedPace(tokens_per_second, fmean(round_tokens) if round_tokens else None)
