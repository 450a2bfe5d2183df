"""A device and a base station in simulated time: the real session and engine, models without weights.

Drafting a token, a forward pass and the link take the seconds that a test says; the
two ends work at the same time. No real time passes.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import cast

import torch

from basestation.segment import Segment
from device.client import Client
from device.draft_model import DraftModel
from device.link import Link
from device.planner import Planners
from device.planner_store import PlannerStore
from device.session import DeviceSession
from device.settings import DraftSettings, Timeouts
from protocol.frames import FrameCodec
from tests.fakes import FakeDraftModel, FakeTarget, Table, manifest
from tests.link_pair import Station


@dataclass
class PairTimes:
    """Seconds: to draft a token, of a forward pass and each token in it, and of the link's round trip."""

    draft: float
    forward: float
    row: float = 0.0
    round_trip: float = 0.0
    bytes_per_second: float = float("inf")


@dataclass
class TimedDraftModel(FakeDraftModel):
    """Advances the clock with each forward pass."""

    pair: "TimedPair | None" = None

    def forward(self, token_ids: Sequence[int]):  # type: ignore[no-untyped-def]
        assert self.pair is not None
        self.pair.run_until(self.pair.now + self.pair.times.draft * (1 + (len(token_ids) - 1) / 8))
        return super().forward(token_ids)


@dataclass
class TimedTarget(FakeTarget):
    """Advances the base station's clock with each forward pass."""

    pair: "TimedPair | None" = None

    def forward(self, segments: Sequence[Segment]) -> torch.Tensor:
        assert self.pair is not None
        rows = sum(len(segment.token_ids) for segment in segments)
        self.pair.station.now += self.pair.times.forward + self.pair.times.row * (rows - 1)
        return super().forward(segments)


@dataclass
class TimedPair:
    """One device and one base station.

    Attributes:
        now: the device's clock, in seconds.
    """

    target_table: Table
    draft_table: Table
    times: PairTimes
    now: float = 0.0
    connections: int = 1
    device: str = "a"
    _events: list[tuple[float, int, bytes, bool]] = field(default_factory=list)  # arrivals: time, order, frame, up
    _free_at: float = 0.0
    _line_free_at: float = 0.0
    _busy_since: float = 0.0

    def __post_init__(self) -> None:
        self._order = count()
        self.target = TimedTarget(self.target_table, pair=self)
        self.station = Station(cast("object", self.target))  # type: ignore[arg-type]
        self.restart_device()

    def restart_device(self, store: PlannerStore | None = None) -> None:
        """A new process of the device, which knows what the store holds; sessions must be closed before."""
        self.model = TimedDraftModel(self.draft_table, manifest(len(self.draft_table)), pair=self)
        self._inbox: list[bytes] = []
        link = Link(self, FrameCodec(len(self.draft_table)), "memory")
        self.client = Client(link, self.model.manifest, Timeouts(), clock=lambda: self.now)
        self.planners = Planners(self.model.manifest.quality, store=store)

    def session(self, settings: DraftSettings, prompt: Sequence[int]) -> DeviceSession:
        planner = self.planners.for_settings(settings, self.client.welcome)
        return DeviceSession(self.client, planner, settings, cast(DraftModel, self.model), list(prompt))

    def send(self, frame: bytes) -> None:
        self._line_free_at = max(self.now, self._line_free_at) + len(frame) / self.times.bytes_per_second
        self._schedule(self._line_free_at + self.times.round_trip / 2, frame, up=True)

    def receive(self, timeout: float) -> bytes | None:
        end = self.now + timeout
        while not self._inbox:
            upcoming = self._next_time()
            if upcoming is None or upcoming > end:
                self.run_until(end)
                return self._inbox.pop(0) if self._inbox else None
            self.run_until(max(self.now, upcoming))
        return self._inbox.pop(0)

    def close(self) -> None:
        pass

    def run_until(self, end: float) -> None:
        """Let everything happen that happens until ``end``."""
        while (upcoming := self._next_time()) is not None and upcoming <= end:
            if self._events and self._events[0][0] <= upcoming:
                moment, _, frame, up = heapq.heappop(self._events)
                if up:
                    self.station.push(b"a", frame)
                    self._deliver(moment)
                else:
                    self._inbox.append(frame)
            else:
                self._step(upcoming)
        self.now = max(self.now, end)

    def _next_time(self) -> float | None:
        times = [self._events[0][0]] if self._events else []
        if self.station.engine.busy:
            times.append(max(self._free_at, self._busy_since))
        return min(times, default=None)

    def _step(self, moment: float) -> None:
        self.station.now = moment
        self.station.engine.step()
        self._free_at = self.station.now
        self._deliver(self._free_at)
        self._busy_since = self._free_at

    def _deliver(self, moment: float) -> None:
        """Send what the base station has for the device."""
        self._busy_since = max(self._busy_since, moment)
        while self.station.outboxes[b"a"]:
            frame = self.station.codec.encode(self.station.outboxes[b"a"].popleft())
            self._schedule(moment + self.times.round_trip / 2, frame, up=False)

    def _schedule(self, moment: float, frame: bytes, up: bool) -> None:
        heapq.heappush(self._events, (moment, next(self._order), frame, up))
