"""Devices that a test drives message by message, and a base station whose target is a table."""

from collections.abc import Sequence
from typing import cast

import numpy as np

from basestation.engine.scheduler import PassBudget
from protocol.messages import PROTOCOL_VERSION, Draft, Hello, Message, Mode, Open, Sampling, Verdict
from tests.fakes import TARGET, VOCAB, FakeTarget, target_alone
from tests.link_pair import Station
from tests.raw_device import CODEC

BUDGET = PassBudget(64, 16)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, VOCAB, length).tolist()
    return ids


class ScriptedDevice:
    """A device with one session, driven message by message."""

    def __init__(self, station: Station, name: int, prompt: Sequence[int], version: int = PROTOCOL_VERSION) -> None:
        self.station, self.peer = station, bytes([name])
        self.tokens = list(prompt)
        self.round_id = 0
        vocabulary = target_of(station).vocabulary
        self.send(Hello(version, VOCAB, vocabulary.hash_of_first(vocabulary.size), tuple(vocabulary.stop_ids)))
        self.station.outboxes[self.peer].clear()
        self.send(Open(0, 0, Mode.IDS, Sampling(), tuple(prompt)))

    def send(self, message: Message) -> None:
        self.station.push(self.peer, CODEC.encode(message))

    def receive(self) -> list[Message]:
        messages = list(self.station.outboxes[self.peer])
        self.station.outboxes[self.peer].clear()
        return messages

    def draft(self, count: int = 4) -> None:
        """Draft ``count`` tokens, of which only the last is wrong."""
        self.round_id += 1
        expected = target_alone(TARGET, self.tokens, count)
        self.drafted = (*expected[:-1], (expected[-1] + 1) % VOCAB)
        self.send(Draft(0, self.round_id, self.drafted))

    def commit(self) -> None:
        (verdict,) = self.receive()
        assert isinstance(verdict, Verdict)
        expected = target_alone(TARGET, self.tokens, len(self.drafted))
        assert (verdict.accepted, verdict.token_id) == (len(self.drafted) - 1, expected[-1])
        self.tokens += expected


def target_of(station: Station) -> FakeTarget:
    return cast(FakeTarget, vars(station.engine)["_target"])


def new_station(budget: PassBudget = BUDGET, capacity: int = 2**20, memory: int | None = None) -> Station:
    return Station(FakeTarget.make(TARGET, capacity=capacity, memory=memory, context_length=capacity), budget=budget)


def settle(station: Station) -> None:
    while station.engine.busy:
        station.engine.step()
