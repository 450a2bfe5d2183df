"""A device and a base station in simulated time: the real session and engine, models without weights.

Drafting a token, a forward pass and the link take the seconds that a test says, and the
two ends work at the same time. No real time passes.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from math import inf
from typing import cast

import torch

from basestation.target.segment import Segment
from basestation.target.target_model import TargetModel
from device.drafting.draft_model import DraftModel, Logits, SequenceModel
from device.link.link import Link
from device.planning.planner_store import PlannerStore
from device.planning.planners import Planners
from device.session.client import Client
from device.session.session import DeviceSession
from device.settings import DraftSettings, Timeouts
from protocol.frames import FrameCodec
from protocol.messages import Message
from tests.fakes import FakeDraftModel, FakeTarget, Table, manifest
from tests.link_pair import Station

_PEER = b"a"
_PREFILL_SHARE = 1 / 8
"""Time of a further token in a forward pass of the draft model, over that of the first."""


@dataclass(frozen=True)
class PairTimes:
    """Seconds of each step.

    Attributes:
        draft: to draft a token.
        forward: of a forward pass of the target, which runs one token.
        row: of each further token in it.
        round_trip: of the link.
        bytes_per_second: of the uplink.
    """

    draft: float
    forward: float
    row: float = 0.0
    round_trip: float = 0.0
    bytes_per_second: float = inf


@dataclass
class TimedDraftModel(FakeDraftModel):
    """Each forward pass takes its time."""

    run_for: Callable[[float], None] = lambda _: None
    draft_seconds: float = 0.0

    def forward(self, token_ids: Sequence[int]) -> Logits:
        self.run_for(self.draft_seconds * (1 + _PREFILL_SHARE * (len(token_ids) - 1)))
        return super().forward(token_ids)


@dataclass
class TimedTarget(FakeTarget):
    """Each forward pass takes its time."""

    run_for: Callable[[int], None] = lambda _: None

    def forward(self, segments: Sequence[Segment]) -> torch.Tensor:
        self.run_for(sum(len(segment.token_ids) for segment in segments))
        return super().forward(segments)


class TimedPair:
    """One device and one base station; the pair is also their link.

    Attributes:
        now: the device's clock.
        times: of each step; may change.
        sent: the messages of the device.
    """

    target_class: type[TimedTarget] = TimedTarget

    def __init__(
        self, target_table: Table, draft_table: Table, times: PairTimes, timeouts: Timeouts | None = None
    ) -> None:
        self.now = 0.0
        self._timeouts = timeouts or Timeouts()
        self.connections = 1
        self.device = "a"
        self.times = times
        self.sent: list[Message] = []
        self._draft_table = draft_table
        self.target = self.target_class(target_table, run_for=self._run_target)
        self._station = Station(cast(TargetModel, self.target))
        self._arrivals: list[tuple[float, int, bytes, bool]] = []  # time, order, frame, whether at the base station
        self._order = count()
        self._inbox: deque[bytes] = deque()
        self._line_free_at = self._engine_free_at = 0.0
        self.restart_device()

    def restart_device(self, store: PlannerStore | None = None) -> None:
        """A new process of the device, which knows what the store holds; sessions must be closed before."""
        own = manifest(len(self._draft_table))
        seconds = self.times.draft
        self._model = TimedDraftModel(self._draft_table, own, run_for=self.run_for, draft_seconds=seconds)
        self._inbox.clear()
        link = Link(self, FrameCodec(len(self._draft_table)), "memory")
        self.client = Client(link, own, self._timeouts, clock=lambda: self.now)
        self.planners = Planners(own.quality, store=store)

    def session(
        self,
        settings: DraftSettings,
        prompt: Sequence[int],
        model: SequenceModel | None = None,
        prediction: Sequence[int] = (),
    ) -> DeviceSession:
        """A session with the pair's draft model, or with another ``model``."""
        planner = self.planners.for_settings(settings, self.client.welcome)
        return DeviceSession(self.client, planner, settings, model or self.model, list(prompt), prediction=prediction)

    @property
    def model(self) -> SequenceModel:
        return cast(DraftModel, self._model)

    @property
    def draft_passes(self) -> list[int]:
        """Tokens of each forward pass of the draft model."""
        return self._model.passes

    def send(self, frame: bytes) -> None:
        self.sent.append(self.decode(frame))
        self._line_free_at = max(self.now, self._line_free_at) + len(frame) / self.times.bytes_per_second
        self._schedule(self._line_free_at, frame, at_station=True)

    def decode(self, frame: bytes) -> Message:
        return self._station.codec.decode(frame)

    def receive(self, timeout: float) -> bytes | None:
        end = self.now + timeout
        while not self._inbox and (upcoming := self._next_time()) <= end:
            self.run_until(max(self.now, upcoming))
        if not self._inbox:
            self.run_until(end)
        return self._inbox.popleft() if self._inbox else None

    def close(self) -> None:
        pass

    def run_for(self, seconds: float) -> None:
        """Let everything happen that happens in so many seconds."""
        self.run_until(self.now + seconds)

    def run_until(self, end: float) -> None:
        """Let everything happen that happens until ``end``."""
        while (upcoming := self._next_time()) <= end:
            if self._arrivals and self._arrivals[0][0] <= upcoming:
                moment, _, frame, at_station = heapq.heappop(self._arrivals)
                if at_station:
                    self._station.push(_PEER, frame)
                    self._reply(moment)
                else:
                    self._inbox.append(frame)
            else:
                self._step(upcoming)
        self.now = max(self.now, end)

    def _next_time(self) -> float:
        """When the next thing happens: a frame arrives, or the engine begins a forward pass."""
        step = self._engine_free_at if self._station.engine.busy else inf
        return min(self._arrivals[0][0] if self._arrivals else inf, step)

    def _step(self, moment: float) -> None:
        self._station.now = moment
        self._station.engine.step()
        self._reply(self._station.now)

    def _run_target(self, rows: int) -> None:
        self._station.now += self.times.forward + self.times.row * (rows - 1)

    def _reply(self, moment: float) -> None:
        """Send what the base station has for the device; it begins no forward pass before that."""
        self._engine_free_at = max(self._engine_free_at, moment)
        while self._station.outboxes[_PEER]:
            self._schedule(moment, self._station.codec.encode(self._station.outboxes[_PEER].popleft()))

    def _schedule(self, sent: float, frame: bytes, at_station: bool = False) -> None:
        heapq.heappush(self._arrivals, (sent + self.times.round_trip / 2, next(self._order), frame, at_station))
