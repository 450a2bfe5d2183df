"""Settings, models and links that the invariant tests share.

The models are logit tables, so a loop over the table predicts a greedy answer.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from device.drafting.draft_model import DraftModel
from device.session.session import DeviceSession
from device.settings import DraftSettings
from protocol.messages import Hello, Message, Mode, Open, Sampling, Welcome
from tests.fakes import DRAFT, TARGET, VOCAB, FakeDraftModel, FakeTarget
from tests.link_pair import CopyCount, MemoryTransport, Station, deliver_once, join, open_session

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
MAX_NEW_TOKENS = 40
TURNS = [[7, 8], [1], [0, 11, 4, 4, 2]]
GREEDY, SAMPLED = Sampling(), Sampling(0.9, seed=7)
SETTINGS = [
    *(DraftSettings(mode, GREEDY, 4, 4) for mode in (Mode.IDS, Mode.TOPK, Mode.TOPP, Mode.FULL, Mode.TARGET)),
    DraftSettings(Mode.TOPK, SAMPLED, 4, 4, uplink_steps=5),
    DraftSettings(Mode.TOPP, SAMPLED, VOCAB, 4, uplink_p=0.8),
    DraftSettings(Mode.TOPK, SAMPLED, 4, 4, block_verification=True),
    *(DraftSettings(mode, SAMPLED, 4, 4) for mode in (Mode.TOPK, Mode.FULL, Mode.TARGET)),
]
SAMPLED_SETTINGS = SETTINGS[-6:-1]


def settings_name(settings: DraftSettings) -> str:
    coarse = "-coarse" if settings.uplink_steps else ""
    block = "-block" if settings.block_verification else ""
    return f"{settings.mode}-{'greedy' if settings.sampling.greedy else 'sampled'}{coarse}{block}"


every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=settings_name)


def draft_model(stop_ids: tuple[int, ...] = (), context_length: int = 4096) -> DraftModel:
    return FakeDraftModel.make(DRAFT, stop_ids, context_length)


def new_station(stop_ids: tuple[int, ...] = (), context_length: int = 4096) -> Station:
    return Station(FakeTarget.make(TARGET, frozenset(stop_ids), context_length))


def token_ids_of(session: DeviceSession, count: int = MAX_NEW_TOKENS) -> list[int]:
    return [token.token_id for token in session.answer(count)]


def answer(
    settings: DraftSettings,
    up: CopyCount = deliver_once,
    down: CopyCount = deliver_once,
    prompt: Sequence[int] = PROMPT,
    count: int = MAX_NEW_TOKENS,
) -> list[int]:
    """The answer of a new session at a new base station."""
    station, model = new_station(), draft_model()
    client, _ = join(station, model, MemoryTransport(station, up=up, down=down))
    return token_ids_of(open_session(client, settings, model, list(prompt)), count)


def first_copies_lost(*kinds: type[Message]) -> CopyCount:
    """Lose each message of these kinds the first time it is sent."""
    seen: set[Hashable] = set()

    def copies(message: Message) -> int:
        if not isinstance(message, kinds) or isinstance(message, Hello | Welcome):
            return 1
        key = type(message), getattr(message, "session_id", None), getattr(message, "round_id", None)
        if key in seen:
            return 1
        seen.add(key)
        return 0

    return copies


def duplicate(_: Message) -> int:
    return 2


def lossy(seed: int, rate: float = 0.3) -> CopyCount:
    """Lose or duplicate messages at random, except Hello and Welcome."""
    rng = np.random.default_rng(seed)

    def copies(message: Message) -> int:
        if isinstance(message, Hello | Welcome):
            return 1
        return int(rng.choice([0, 1, 2], p=[rate, 0.9 - rate, 0.1]))

    return copies


def open_request(sampling: Sampling = GREEDY, session_id: int = 0) -> Open:
    return Open(session_id, 0, Mode.IDS if sampling.greedy else Mode.TARGET, sampling, tuple(PROMPT))


@dataclass
class RecordingTransport(MemoryTransport):
    """Records the frames of both directions."""

    downlink: list[bytes] = field(default_factory=list)

    def receive(self, timeout: float) -> bytes | None:
        frame = super().receive(timeout)
        if frame is not None:
            self.downlink.append(frame)
        return frame
