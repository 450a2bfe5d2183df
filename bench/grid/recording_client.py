"""A client that keeps the figures of every round, for measurements."""

from collections.abc import Sequence
from dataclasses import dataclass

from device.client import Client, Timeouts
from device.link import Link
from device.planner import Planner
from protocol.bundle import Manifest, QualityFigures

_GIVE_UP_SECONDS = 20.0


@dataclass(frozen=True)
class RoundFigures:
    """Of one round, as a planner observes it."""

    margins: tuple[float | None, ...]
    accepted: int
    draft_seconds: float
    reply_seconds: float | None

    @property
    def drafted(self) -> int:
        """How many tokens."""
        return len(self.margins)


class RecordingClient(Client):
    """Attributes: ``rounds``, all so far; take them out as needed."""

    def __init__(self, link: Link, manifest: Manifest) -> None:
        self.rounds: list[RoundFigures] = []
        super().__init__(link, manifest, Timeouts(reply=_GIVE_UP_SECONDS))

    def _new_planner(self, quality: QualityFigures, greedy: bool) -> Planner:
        return _RecordingPlanner(quality, greedy, self.rounds)


class _RecordingPlanner(Planner):
    def __init__(self, quality: QualityFigures, greedy: bool, rounds: list[RoundFigures]) -> None:
        super().__init__(quality, greedy)
        self._kept = rounds

    def observe(
        self, margins: Sequence[float | None], accepted: int, draft_seconds: float, reply_seconds: float | None
    ) -> None:
        """Take the figures of a round, and keep them."""
        self._kept.append(RoundFigures(tuple(margins), accepted, draft_seconds, reply_seconds))
        super().observe(margins, accepted, draft_seconds, reply_seconds)
