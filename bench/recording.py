"""A client that keeps the figures of every round, for measurements."""

from collections.abc import Sequence
from dataclasses import dataclass

from device.client import Client, Patience
from device.link import Link
from device.live_planner import LivePlanner
from protocol.bundle import GateFigures, Manifest

_GIVE_UP_SECONDS = 20.0


@dataclass(frozen=True)
class RoundFigures:
    """Of one round, as a planner observes it."""

    leads: tuple[float | None, ...]
    accepted: int
    draft_seconds: float
    reply_seconds: float | None

    @property
    def drafted(self) -> int:
        """How many tokens."""
        return len(self.leads)


class RecordingClient(Client):
    """Attributes: ``rounds``, all so far; take them out as needed."""

    def __init__(self, link: Link, manifest: Manifest) -> None:
        self.rounds: list[RoundFigures] = []
        super().__init__(link, manifest, Patience(reply=_GIVE_UP_SECONDS))

    def _new_planner(self, gate: GateFigures, greedy: bool) -> LivePlanner:
        return _RecordingPlanner(gate, greedy, self.rounds)


class _RecordingPlanner(LivePlanner):
    def __init__(self, gate: GateFigures, greedy: bool, rounds: list[RoundFigures]) -> None:
        super().__init__(gate, greedy)
        self._kept = rounds

    def observe(
        self, leads: Sequence[float | None], accepted: int, draft_seconds: float, reply_seconds: float | None
    ) -> None:
        """Take the figures of a round, and keep them."""
        self._kept.append(RoundFigures(tuple(leads), accepted, draft_seconds, reply_seconds))
        super().observe(leads, accepted, draft_seconds, reply_seconds)
