"""A device and a base station joined in memory, over a link that can lose and duplicate frames."""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from basestation.devices.peer import Peer
from basestation.engine.engine import Engine
from basestation.engine.scheduler import PassBudget
from basestation.sessions.grammars import RunElsewhere, run_here
from basestation.target.target_model import TargetModel
from common.grammar import Grammar
from device.drafting.draft_model import SequenceModel
from device.link.link import Link
from device.planning.planners import Planners
from device.session.client import Client
from device.session.session import DeviceSession
from device.settings import DraftSettings, Timeouts
from protocol.errors import FullError, ProtocolError
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import Fault, Message, Mode, Open, Sampling

IDS = DraftSettings(Mode.IDS, Sampling(), uplink_k=4, draft_len=4)
CopyCount: TypeAlias = Callable[[Message], int]
"""How many copies of a message arrive: 0 loses it, 2 duplicates it."""


def deliver_once(_: Message) -> int:
    return 1


class Station:
    """An engine without a socket, for any number of peers."""

    def __init__(
        self,
        target: TargetModel,
        limits: Limits | None = None,
        budget: PassBudget | None = None,
        run_elsewhere: RunElsewhere = run_here,
    ) -> None:
        self.limits = limits or Limits()
        self.codec = FrameCodec(target.vocabulary.size, self.limits)
        self.now = 0.0
        self.engine = Engine(
            target,
            self.limits,
            budget or PassBudget(256, 64),
            self._deliver,
            clock=lambda: self.now,
            run_elsewhere=run_elsewhere,
        )
        self.outboxes: defaultdict[bytes, deque[Message]] = defaultdict(deque)

    def push(self, peer: bytes, frame: bytes) -> None:
        try:
            message = self.codec.decode(frame)
        except ProtocolError as error:
            self.engine.fault(Peer.without_key(peer), None, error)
        else:
            self.engine.receive(Peer.without_key(peer), message)

    def pull(self, peer: bytes) -> Message | None:
        while not self.outboxes[peer] and self.engine.busy:
            self.engine.step()
        return self.outboxes[peer].popleft() if self.outboxes[peer] else None

    def _deliver(self, peer: bytes, message: Message) -> int:
        self.outboxes[peer].append(message)
        return len(self.codec.encode(message))


@dataclass
class MemoryTransport:
    """Transports the frames of one device; the clock advances only while it waits."""

    station: Station
    peer: bytes = b"a"
    up: CopyCount = deliver_once
    down: CopyCount = deliver_once
    now: float = 0.0
    connections: int = 1
    uplink: list[bytes] = field(default_factory=list)
    _arrived: deque[bytes] = field(default_factory=deque)

    @property
    def device(self) -> str:
        return self.peer.hex()

    def send(self, frame: bytes) -> None:
        self.uplink.append(frame)
        for _ in range(self.up(self.station.codec.decode(frame))):
            self.station.push(self.peer, frame)

    def receive(self, timeout: float) -> bytes | None:
        while not self._arrived:
            message = self.station.pull(self.peer)
            if message is None:
                self.now += timeout
                return None
            self._arrived.extend([self.station.codec.encode(message)] * self.down(message))
        return self._arrived.popleft()

    def close(self) -> None:
        pass


class TimedTransport(MemoryTransport):
    """Advances the base station's clock with the device's."""

    def receive(self, timeout: float) -> bytes | None:
        before = self.now
        frame = super().receive(timeout)
        self.station.now += self.now - before
        return frame


class RefusingTransport(TimedTransport):
    """A base station that refuses to open sessions until a given time.

    Attributes:
        code: error code of the Faults.
        opens_at: time of the first Open that is not refused, in seconds.
        retry_seconds: ``retry_seconds`` of the Faults.
        refused_at: times of the refused Opens.
    """

    code = FullError.code
    opens_at = 0.0
    retry_seconds = 0

    def __init__(self, station: Station) -> None:
        super().__init__(station)
        self.refused_at: list[float] = []

    def send(self, frame: bytes) -> None:
        message = self.station.codec.decode(frame)
        if isinstance(message, Open) and self.now < self.opens_at:
            self.refused_at.append(self.now)
            fault = Fault(message.session_id, self.code, "no room", self.retry_seconds)
            self.station.outboxes[self.peer].append(fault)
        else:
            super().send(frame)


def open_session(
    client: Client,
    settings: DraftSettings,
    model: SequenceModel,
    prompt: list[int],
    planners: Planners | None = None,
    grammar: Grammar | None = None,
    prediction: Sequence[int] = (),
) -> DeviceSession:
    """Open a session; sessions that share ``planners`` share their measurements."""
    planner = (planners or Planners(model.manifest.quality)).for_settings(settings, client.welcome)
    return DeviceSession(client, planner, settings, model, prompt, grammar, prediction)


def join(
    station: Station,
    model: SequenceModel,
    transport: MemoryTransport | None = None,
    timeouts: Timeouts | None = None,
) -> tuple[Client, Link]:
    """Connect a client to ``station``."""
    transport = transport or MemoryTransport(station)
    link = Link(transport, FrameCodec(model.manifest.vocab_size), "memory")
    return Client(link, model.manifest, timeouts or Timeouts(), clock=lambda: transport.now), link
