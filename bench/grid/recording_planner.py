"""Planners that keep the figures of every round, for measurements."""

from collections.abc import Sequence
from dataclasses import dataclass

from device.planning.planner import Planner
from device.planning.planners import Planners
from protocol.bundle import QualityFigures


@dataclass(frozen=True)
class RoundFigures:
    """One round, as a planner observes it."""

    margins: tuple[float | None, ...]
    accepted: int
    draft_seconds: float
    reply_seconds: float | None

    @property
    def drafted(self) -> int:
        """Tokens drafted."""
        return len(self.margins)


class RecordingPlanners(Planners):
    """Planners that append each observed round to ``rounds``."""

    def __init__(self, quality: QualityFigures) -> None:
        self.rounds: list[RoundFigures] = []
        super().__init__(quality, lambda quality, greedy: _RecordingPlanner(quality, greedy, self.rounds))


class _RecordingPlanner(Planner):
    def __init__(self, quality: QualityFigures, greedy: bool, rounds: list[RoundFigures]) -> None:
        super().__init__(quality, greedy)
        self._recorded = rounds

    def observe(
        self,
        margins: Sequence[float | None],
        accepted: int,
        draft_seconds: float,
        reply_seconds: float | None,
        round_seconds: float | None,
    ) -> None:
        """Record a round, and keep its figures."""
        self._recorded.append(RoundFigures(tuple(margins), accepted, draft_seconds, reply_seconds))
        super().observe(margins, accepted, draft_seconds, reply_seconds, round_seconds)
