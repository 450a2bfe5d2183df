"""With the real sample model in float32: what a session says does not depend on who else is there."""

import random
from collections import deque
from itertools import islice

import pytest

from basestation.engine import Engine, Peer
from basestation.scheduler import PassBudget
from basestation.target_model import TargetModel
from protocol.limits import Limits
from protocol.messages import PROTOCOL_VERSION, Close, Draft, Hello, Message, Mode, Open, Sampling, Verdict
from tests.sample import SAMPLE

pytestmark = pytest.mark.model

SESSIONS = 32
"""At once, as long as somebody is left to come."""
COMERS = 44
WORDS = list(range(1000, 3000))


class Talker:
    """A device that drafts from its own answer, some tokens of it wrong; one without an answer vanishes in a round.

    Attributes:
        answer_len: how many tokens it wants.
    """

    def __init__(self, station: "Station", name: int, answer: list[int] | None) -> None:
        chance = random.Random(name)  # noqa: S311 - a fixed choice
        self.name = name
        self.peer = Peer.without_key(name.to_bytes(2, "big"))
        self.prompt = chance.choices(WORDS, k=100 if name % 16 == 5 else chance.randrange(3, 20))
        self.answer_len = chance.randrange(4, 13)
        self.mode, self.sampling = ((Mode.IDS, Sampling()), (Mode.COUPLED, Sampling(0.8, seed=name)))[name % 2]
        self.tokens = list(self.prompt)
        self.drafted_len = self.accepted_len = 0
        self._vanishes_in = None if answer else chance.randrange(1, 5)
        self._station = station
        self._chance = chance
        self._answer = answer or chance.choices(WORDS, k=30)
        self._round_id = 0
        vocabulary = station.target.vocabulary
        self._say(Hello(PROTOCOL_VERSION, vocabulary.size, vocabulary.sha256, tuple(vocabulary.stop_ids)))
        self._say(Open(0, 0, self.mode, self.sampling, tuple(self.prompt)))
        station.outbox(self.peer).clear()

    @property
    def said(self) -> list[int]:
        """As much of the answer as it wants and has."""
        return self.tokens[len(self.prompt) :][: self.answer_len]

    @property
    def vanishes(self) -> bool:
        """Whether it is gone before the Verdict of the round that it has just sent."""
        return self._round_id == self._vanishes_in

    def draft(self, alone: bool = False) -> None:
        self._round_id += 1
        place = len(self.tokens) - len(self.prompt)
        guess = [] if alone else self._answer[place : place + self._chance.randrange(1, 6)]
        self.drafted = tuple(token if self._chance.random() < 0.8 else 5 for token in guess)
        self._say(Draft(0, self._round_id, self.drafted))

    def heard(self) -> bool:
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

    def leave(self) -> None:
        self._say(Close(0))

    def _say(self, message: Message) -> None:
        self._station.engine.receive(self.peer, message)


class Station:
    """An engine without a socket, and a clock that stands still."""

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


def alone(target: TargetModel, name: int) -> list[int]:
    """What a session says that has the base station for itself, a token a pass."""
    station = Station(target)
    talker = Talker(station, name, [0])
    while len(talker.said) < talker.answer_len:
        talker.draft(alone=True)
        while not talker.heard():
            station.engine.step()
    talker.leave()
    return talker.said


def test_every_session_of_32_that_come_go_and_vanish_says_what_it_says_alone() -> None:
    target = TargetModel.load(str(SAMPLE), "float32", "cpu", "256MiB")
    staying = [name for name in range(COMERS) if name % 4 != 3]
    assert len(staying) > SESSIONS
    expected = {name: alone(target, name) for name in staying}
    station, comers = Station(target), iter(range(COMERS))
    present: list[Talker] = []
    gone: list[Talker] = []
    vanished = 0
    while len(gone) < len(staying):
        arriving = [Talker(station, name, expected.get(name)) for name in islice(comers, SESSIONS - len(present))]
        drafting = [*arriving, *(talker for talker in present if talker.heard())]
        present += arriving
        for talker in drafting:
            if talker.name in expected and len(talker.said) == talker.answer_len:
                talker.leave()
                present.remove(talker)
                gone.append(talker)
                continue
            talker.draft()
            if talker.vanishes:
                vanished += 1
                present.remove(talker)
                if vanished % 2:  # the others without a word
                    talker.leave()
        station.engine.step()
    assert {talker.name: talker.said for talker in gone} == expected
    assert vanished == COMERS - len(staying)
    assert 0.4 < sum(one.accepted_len for one in gone) / sum(one.drafted_len for one in gone) < 0.9
    station.now += Limits().idle_timeout + 1
    station.engine.drop_idle()
    assert target.kv_pool.used == 0
