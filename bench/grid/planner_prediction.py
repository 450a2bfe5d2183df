"""Predicted throughput of ``--draft-len auto``: the planner runs over recorded rounds with modelled times.

In modes ``ids`` and ``coupled``, whether a drafted token is accepted depends only
on its position in the answer, not on the rounds before. Consecutive rounds of a
long fixed draft length are therefore a trace over which any other plan can be
simulated: for every position it holds the margin of the drafted token and whether
it was accepted. In other modes acceptance is random, and the trace is one sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from common.round_model import RoundTimes
from device.planning.planner import Planner
from protocol.bundle import QualityFigures

_WARM_UP = 24


@dataclass(frozen=True)
class VerifiedDraft:
    """The margins of the drafted tokens (None where sampled) and the number of accepted ones."""

    margins: Sequence[float | None]
    accepted: int


class AcceptanceTrace:
    """Consecutive rounds of one draft length; a simulated round can start at any of their tokens.

    Args:
        rounds: in order; the last is followed by the first again.
    """

    def __init__(self, rounds: Sequence[VerifiedDraft]) -> None:
        self._rounds = rounds
        self._starts = list(accumulate((one.accepted + 1 for one in rounds), initial=0))
        self.length = self._starts.pop()
        self._round_at = [index for index, one in enumerate(rounds) for _ in range(one.accepted + 1)]

    def draft(self, position: int, planner: Planner) -> VerifiedDraft:
        """The tokens that the planner drafts at a position, and how many of them are accepted.

        A bonus token was sampled by the target; its margin is unknown and it counts as accepted. After a rejected
        token the draft continues as recorded in that round, then as in the rounds that follow.
        """
        margins: list[float | None] = []
        accepted, all_accepted = 0, True
        index = self._round_at[position % self.length]
        offset = position % self.length - self._starts[index]
        while planner.should_continue(margins):
            recorded = self._rounds[index]
            margins.append(recorded.margins[offset] if offset < len(recorded.margins) else None)
            all_accepted = all_accepted and (offset < recorded.accepted or offset == len(recorded.margins))
            accepted += all_accepted
            offset += 1
            has_bonus = recorded.accepted == len(recorded.margins)
            if offset >= len(recorded.margins) + has_bonus:
                index, offset = (index + 1) % len(self._rounds), 0
        return VerifiedDraft(margins, accepted)


@dataclass(frozen=True)
class PlannedThroughput:
    """Predicted tokens per second, and tokens per round over the rounds that draft something."""

    tokens_per_second: float
    tokens_per_round: float | None


def planned_throughput(
    quality: QualityFigures, greedy: bool, rounds: Sequence[VerifiedDraft], times: RoundTimes
) -> PlannedThroughput:
    """Simulate the planner for one pass over the trace, after a warm-up.

    Args:
        quality: figures of the draft model, the planner's initial estimates.
        greedy: whether the temperature is 0.
        rounds: of a fixed draft length; at least one.
        times: of a round.
    """
    trace, planner = AcceptanceTrace(rounds), Planner(quality, greedy)
    planner.observe_opened(times.round_trip_seconds)
    position, seconds, start = 0, 0.0, (0, 0.0)
    round_tokens: list[int] = []
    while position - start[0] < trace.length:
        tokens, elapsed, drafted = _step(planner, trace, position, times)
        position, seconds = position + tokens, seconds + elapsed
        if drafted:
            round_tokens.append(tokens)
        if position >= _WARM_UP and not start[0]:
            start = position, seconds
            round_tokens.clear()
    tokens_per_second = (position - start[0]) / (seconds - start[1])
    return PlannedThroughput(tokens_per_second, fmean(round_tokens) if round_tokens else None)


def _step(planner: Planner, trace: AcceptanceTrace, position: int, times: RoundTimes) -> tuple[int, float, bool]:
    """One decision of the planner: the tokens committed, the seconds taken, and whether it drafted."""
    if count := planner.decode_len():
        first = times.round_trip_seconds + times.target_seconds()
        further = (count - 1) * times.target_seconds()
        planner.observe_decoded(count, first, further)
        return count, first + further, False
    verified = trace.draft(position, planner)
    drafting = len(verified.margins) * times.draft_seconds
    reply = times.seconds(len(verified.margins)) - drafting
    planner.observe(verified.margins, verified.accepted, drafting, reply, drafting + reply)
    return verified.accepted + 1, drafting + reply, True
