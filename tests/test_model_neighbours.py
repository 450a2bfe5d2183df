"""With the real sample model in float32: what a session says does not depend on who else is there."""

import random
from collections import deque

import pytest

from basestation.engine import Engine, Peer
from basestation.scheduler import PassBudget
from basestation.target_model import TargetModel
from protocol.limits import Limits
from protocol.messages import PROTOCOL_VERSION, Close, Draft, Hello, Message, Mode, Open, Sampling, Verdict
from tests.sample import SAMPLE

pytestmark = pytest.mark.model

SESSIONS = 32
KEPT = 4
ANSWER_LEN = 12
WORDS = list(range(1000, 3000))


class Talker:
    """A device whose drafts are drawn at random from its reference answer, some tokens of them wrong."""

    def __init__(self, station: "Station", name: int, answer: list[int] | None) -> None:
        chance = random.Random(name)  # noqa: S311 - a fixed choice
        self.peer = Peer.without_key(name.to_bytes(2, "big"))
        self.prompt = chance.choices(WORDS, k=chance.randrange(3, 20))
        self.mode, self.sampling = ((Mode.IDS, Sampling()), (Mode.COUPLED, Sampling(0.8, seed=name)))[name % 2]
        self.tokens = list(self.prompt)
        self._station = station
        self._chance = chance
        self._answer = answer
        self._round_id = 0
        vocabulary = station.target.vocabulary
        self._say(Hello(PROTOCOL_VERSION, vocabulary.size, vocabulary.sha256, tuple(vocabulary.stop_ids)))
        self._say(Open(0, 0, self.mode, self.sampling, tuple(self.prompt)))
        station.outbox(self.peer).clear()

    def draft(self) -> None:
        self._round_id += 1
        place = len(self.tokens) - len(self.prompt)
        self.drafted: tuple[int, ...] = ()
        if self._answer is not None:
            guess = self._answer[place : place + self._chance.randrange(1, 6)]
            self.drafted = tuple(token if self._chance.random() < 0.8 else 5 for token in guess)
        self._say(Draft(0, self._round_id, self.drafted))

    def heard(self) -> bool:
        for message in list(self._station.outbox(self.peer)):
            assert isinstance(message, Verdict), message
            self.tokens += [*self.drafted[: message.accepted], message.token_id]
            self._station.outbox(self.peer).clear()
            return True
        return False

    def leave(self) -> None:
        self._say(Close(0))

    def _say(self, message: Message) -> None:
        self._station.engine.receive(self.peer, message)


class Station:
    """An engine without a socket."""

    def __init__(self, target: TargetModel) -> None:
        self.target = target
        self.engine = Engine(target, Limits(), PassBudget(), self._deliver)
        self._outboxes: dict[bytes, deque[Message]] = {}

    def outbox(self, peer: Peer) -> deque[Message]:
        return self._outboxes.setdefault(peer.address, deque())

    def _deliver(self, address: bytes, message: Message) -> int:
        self._outboxes.setdefault(address, deque()).append(message)
        return 0


def alone(target: TargetModel, name: int) -> list[int]:
    station = Station(target)
    talker = Talker(station, name, None)
    while len(talker.tokens) < len(talker.prompt) + ANSWER_LEN:
        talker.draft()
        while not talker.heard():
            station.engine.step()
    talker.leave()
    return talker.tokens[len(talker.prompt) :]


def test_a_session_says_what_it_says_alone_among_31_that_come_and_go() -> None:
    target = TargetModel.load(str(SAMPLE), "float32", "cpu", "256MiB")
    expected = {name: alone(target, name) for name in range(KEPT)}
    station, chance = Station(target), random.Random(1)  # noqa: S311 - a fixed choice
    kept = {name: Talker(station, name, expected[name]) for name in range(KEPT)}
    others = {name: Talker(station, name, None) for name in range(KEPT, SESSIONS)}
    following = SESSIONS
    for talker in (*kept.values(), *others.values()):
        talker.draft()
    while unfinished := [one for one in kept.values() if len(one.tokens) < len(one.prompt) + ANSWER_LEN]:
        station.engine.step()
        for talker in [*unfinished, *others.values()]:
            if talker.heard():
                talker.draft()
        for name in chance.sample(sorted(others), 2):  # gone in the middle of a round
            others.pop(name).leave()
            others[following] = Talker(station, following, None)
            others[following].draft()
            following += 1
    for name, talker in kept.items():
        assert talker.tokens[len(talker.prompt) :][:ANSWER_LEN] == expected[name]
    for talker in (*kept.values(), *others.values()):
        talker.leave()
    assert target.arena.used == 0
