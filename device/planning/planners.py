"""The planners of one base station, which start from what earlier processes learnt and leave it to later ones."""

from collections.abc import Callable

from device.planning.planner import Planner
from device.planning.planner_store import PlannerStore
from device.settings import DraftSettings
from protocol.bundle import QualityFigures
from protocol.messages import Mode, Welcome

_MAX_PLANNERS = 64
"""Kept at most: programs may ask for any number of temperatures."""


class Planners:
    """The planners of one base station: settings whose estimates differ have planners of their own.

    Of more than ``_MAX_PLANNERS`` the one that was asked for longest ago is forgotten.

    Rounds of a fixed draft length do not update the planner of ``--draft-len auto``: their
    throughput is not what it would reach.

    Args:
        quality: figures of the draft model's quality check.
        new_planner: makes a planner.
        store: keeps what was learnt for later processes; None to forget it.
    """

    def __init__(
        self,
        quality: QualityFigures,
        new_planner: Callable[[QualityFigures, bool], Planner] = Planner,
        store: PlannerStore | None = None,
    ) -> None:
        self._quality = quality
        self._new_planner = new_planner
        self._store = store
        self._planners: dict[tuple[Mode, float, int | None, int | None, bool, bool, str], Planner] = {}

    def for_settings(self, settings: DraftSettings, welcome: Welcome) -> Planner:
        """The planner for a mode, a temperature, ways to draft and to verify, and a target."""
        sampling = settings.sampling
        drafting = settings.draft_len, settings.drafts_ahead, settings.lookup
        key = (settings.mode, sampling.temperature, *drafting, settings.asks_block_verification, welcome.model)
        if key not in self._planners:
            planner = self._planners[key] = self._new_planner(self._quality, settings.sampling.greedy)
            known = self._store.read(settings, welcome) if self._store and settings.draft_len is None else None
            planner.start(welcome.pass_seconds, welcome.row_seconds, known)
            if len(self._planners) > _MAX_PLANNERS:
                del self._planners[next(iter(self._planners))]
        self._planners[key] = planner = self._planners.pop(key)  # the last is the one that was asked for last
        return planner

    def keep(self, settings: DraftSettings, welcome: Welcome) -> None:
        """Store what the planner for these settings has learnt so far."""
        figures = self.for_settings(settings, welcome).figures
        if self._store and settings.draft_len is None and figures:
            self._store.write(settings, welcome, figures)
