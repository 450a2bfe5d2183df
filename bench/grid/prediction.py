"""What the model of ``device/planner.py`` says of a cell, from figures that were measured without a link.

Acceptance is taken position by position, times as the mean over rounds: to
draft a token, from a Draft to its Verdict, and between tokens of the target
alone. The machine's speed drifts over an hour, so all three are as much longer or
shorter in a cell as the target alone is there. The link adds its round trip and
the bytes over its rates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.grid.planner_prediction import VerifiedDraft
from bench.grid.throughput import Pace
from device.round_model import Direction, RoundTimes


@dataclass(frozen=True)
class Prediction:
    """Of a case in a cell; ``tokens_per_round`` of rounds in which something is drafted."""

    speedup: float
    tokens_per_round: float | None = None


@dataclass(frozen=True)
class Calibration:
    """Of one mode, measured with fixed draft lengths over loopback.

    Attributes:
        standing: for each draft length, in how many rounds at least 0, 1, 2, … tokens stood.
        draft_seconds: for each, to draft one token.
        reply_seconds: for each, from a Draft to its Verdict.
        round_bytes: for each, sent in a round.
        rounds: of the longest.
    """

    standing: Mapping[int, Sequence[int]]
    draft_seconds: Mapping[int, float]
    reply_seconds: Mapping[int, float]
    round_bytes: Mapping[int, float]
    rounds: Sequence[VerifiedDraft] = ()

    def slowed(self, slowness: float) -> "Calibration":
        """The same on a machine on which all takes ``slowness`` times as long."""
        return replace(
            self,
            draft_seconds={draft_len: slowness * one for draft_len, one in self.draft_seconds.items()},
            reply_seconds={draft_len: slowness * one for draft_len, one in self.reply_seconds.items()},
        )

    def acceptance(self, draft_len: int) -> list[float]:
        """α at each position: of rounds with this draft length, or where there are none over all that reach it."""
        lengths = [draft_len] if draft_len in self.standing else list(self.standing)
        alphas = []
        for position in range(1, max(lengths) + 1):
            reached = [self.standing[one] for one in lengths if one >= position]
            trials = sum(counts[position - 1] for counts in reached)
            if not trials:
                break
            alphas.append(sum(counts[position] for counts in reached) / trials)
        return alphas

    def times(
        self, target_seconds: float, round_trip_seconds: float, bytes_per_second: float, downlink: Direction
    ) -> RoundTimes:
        """Of a round over a link; what drafting takes once a round counts with the reply."""
        lengths = sorted(self.reply_seconds)
        draft_seconds = min(self.draft_seconds.values())
        once = {one: one * (self.draft_seconds[one] - draft_seconds) for one in lengths}
        replies = [self.reply_seconds[one] + once[one] for one in lengths]

        def verify_seconds(draft_len: int) -> float:
            return _at(draft_len, lengths, replies) if draft_len else target_seconds

        sent = [self.round_bytes[one] for one in lengths]
        slope = (sent[-1] - sent[0]) / (lengths[-1] - lengths[0]) if len(lengths) > 1 else sent[0] / lengths[0]
        uplink = Direction(max(0.0, sent[0] - slope * lengths[0]), slope, bytes_per_second)
        return RoundTimes(draft_seconds, verify_seconds, round_trip_seconds, uplink, downlink)


def standing(pace: Pace, draft_len: int) -> list[int]:
    """In how many of its rounds at least 0, 1, … ``draft_len`` tokens stood; rounds cut short by a stop id aside."""
    whole = [one.accepted for one in pace.rounds if one.drafted == draft_len]
    return [sum(accepted >= count for accepted in whole) for count in range(draft_len + 1)]


def _at(place: int, places: Sequence[int], values: Sequence[float]) -> float:
    """The line through the points, its last piece going on beyond them."""
    if place <= places[-1] or len(places) == 1:
        return float(np.interp(place, places, values))
    slope = (values[-1] - values[-2]) / (places[-1] - places[-2])
    return values[-1] + slope * (place - places[-1])
