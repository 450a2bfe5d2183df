"""With the sample model in float32: a session's answer does not depend on other sessions."""

import random
from collections import deque
from itertools import islice

import pytest

from basestation.devices.peer import Peer
from basestation.engine.engine import Engine
from basestation.engine.scheduler import PassBudget
from basestation.target.target_model import TargetModel
from protocol.limits import Limits
from protocol.messages import PROTOCOL_VERSION, Close, Draft, Hello, Message, Mode, Open, Sampling, Verdict
from tests.sample import SAMPLE

pytestmark = pytest.mark.model

SESSIONS = 32
"""Open at the same time."""
DEVICES = 44
WORDS = list(range(1000, 3000))


class DraftingDevice:
    """A device that drafts the expected answer with some wrong tokens.

    Without an expected answer it disappears in the middle of a round.

    Attributes:
        answer_len: tokens until it closes the session.
    """

    def __init__(self, station: "Station", name: int, answer: list[int] | None) -> None:
        rng = random.Random(name)  # noqa: S311 - a fixed choice
        self.name = name
        self.peer = Peer.without_key(name.to_bytes(2, "big"))
        self.prompt = rng.choices(WORDS, k=100 if name % 16 == 5 else rng.randrange(3, 20))
        self.answer_len = rng.randrange(4, 13)
        self.mode, self.sampling = ((Mode.IDS, Sampling()), (Mode.COUPLED, Sampling(0.8, seed=name)))[name % 2]
        self.tokens = list(self.prompt)
        self.drafted_len = self.accepted_len = 0
        self._last_round = None if answer else rng.randrange(1, 5)
        self._station = station
        self._rng = rng
        self._answer = answer or rng.choices(WORDS, k=30)
        self._round_id = 0
        vocabulary = station.target.vocabulary
        self._send(
            Hello(
                PROTOCOL_VERSION, vocabulary.size, vocabulary.hash_of_first(vocabulary.size), tuple(vocabulary.stop_ids)
            )
        )
        self._send(Open(0, 0, self.mode, self.sampling, tuple(self.prompt)))
        station.outbox(self.peer).clear()

    @property
    def answered(self) -> list[int]:
        """The answer so far, at most ``answer_len`` tokens."""
        return self.tokens[len(self.prompt) :][: self.answer_len]

    @property
    def disappears(self) -> bool:
        """Whether it disappears after the Draft it just sent."""
        return self._round_id == self._last_round

    def draft(self, alone: bool = False) -> None:
        self._round_id += 1
        start = len(self.tokens) - len(self.prompt)
        right = [] if alone else self._answer[start : start + self._rng.randrange(1, 6)]
        self.drafted = tuple(token if self._rng.random() < 0.8 else 5 for token in right)
        self._send(Draft(0, self._round_id, self.drafted))

    def receive_verdict(self) -> bool:
        outbox = self._station.outbox(self.peer)
        if not outbox:
            return False
        verdict = outbox.popleft()
        assert isinstance(verdict, Verdict), verdict
        assert not outbox
        self.tokens += [*self.drafted[: verdict.accepted], verdict.token_id]
        self.drafted_len += len(self.drafted)
        self.accepted_len += verdict.accepted
        return True

    def close(self) -> None:
        self._send(Close(0))

    def _send(self, message: Message) -> None:
        self._station.engine.receive(self.peer, message)


class Station:
    """An engine without a socket, with a fixed clock."""

    def __init__(self, target: TargetModel) -> None:
        self.target = target
        self.now = 0.0
        self.engine = Engine(target, Limits(), PassBudget(), self._deliver, clock=lambda: self.now)
        self._outboxes: dict[bytes, deque[Message]] = {}

    def outbox(self, peer: Peer) -> deque[Message]:
        return self._outboxes.setdefault(peer.address, deque())

    def _deliver(self, address: bytes, message: Message) -> int:
        self._outboxes.setdefault(address, deque()).append(message)
        return 0


def answer_alone(target: TargetModel, name: int) -> list[int]:
    """The answer of a session alone at a base station, one token per forward pass."""
    station = Station(target)
    device = DraftingDevice(station, name, [0])
    while len(device.answered) < device.answer_len:
        device.draft(alone=True)
        while not device.receive_verdict():
            station.engine.step()
    device.close()
    return device.answered


def test_every_one_of_32_concurrent_sessions_gets_its_answer_alone() -> None:
    target = TargetModel.load(str(SAMPLE), "float32", "cpu", "256MiB")
    completing = [name for name in range(DEVICES) if name % 4 != 3]
    assert len(completing) > SESSIONS
    expected = {name: answer_alone(target, name) for name in completing}
    station, names = Station(target), iter(range(DEVICES))
    active: list[DraftingDevice] = []
    finished: list[DraftingDevice] = []
    disappeared = 0
    while len(finished) < len(completing):
        opened = [DraftingDevice(station, name, expected.get(name)) for name in islice(names, SESSIONS - len(active))]
        drafting = [*opened, *(device for device in active if device.receive_verdict())]
        active += opened
        for device in drafting:
            if device.name in expected and len(device.answered) == device.answer_len:
                device.close()
                active.remove(device)
                finished.append(device)
                continue
            device.draft()
            if device.disappears:
                disappeared += 1
                active.remove(device)
                if disappeared % 2:  # the others send no Close
                    device.close()
        station.engine.step()
    assert {device.name: device.answered for device in finished} == expected
    assert disappeared == DEVICES - len(completing)
    assert 0.4 < sum(one.accepted_len for one in finished) / sum(one.drafted_len for one in finished) < 0.9
    station.now += Limits().idle_timeout + 1
    station.engine.drop_idle()
    assert target.kv_pool.used == 0
