"""An Extend with sampling settings continues a session as a new one with these settings would."""

import struct

import msgpack
import pytest

from protocol.messages import Draft, Extend, Fault, Message, Mode, Open, Opened, Sampling, Verdict
from tests.fakes import TARGET, VOCAB, FakeTarget
from tests.link_pair import Station
from tests.raw_device import RawDevice, hello

PROMPT, TURN = (3, 1, 4), (5, 9, 2)
GREEDY = Sampling()
SAMPLINGS = (GREEDY, Sampling(0.9, seed=7), Sampling(0.9, seed=8), Sampling(1.4, 6, 0.8, 7))
CHANGES = [(before, after) for before in SAMPLINGS for after in SAMPLINGS if before != after]


def new_device() -> RawDevice:
    return RawDevice(Station(FakeTarget.make(TARGET)))


def answer(device: RawDevice, round_id: int, count: int = 12) -> list[int]:
    """Tokens of Drafts of two tokens, from a round on."""
    tokens: list[int] = []
    while len(tokens) < count:
        drafted = (5, 7) if len(tokens) % 2 else ()
        verdict = device.request(Draft(0, round_id, drafted))
        assert isinstance(verdict, Verdict)
        tokens += [*drafted[: verdict.accepted], verdict.token_id]
        round_id += 1
    return tokens[:count]


def fresh_answer(sampling: Sampling, prompt: tuple[int, ...], mode: Mode = Mode.COUPLED) -> list[int]:
    device = new_device()
    assert device.request(Open(0, 0, mode, sampling, prompt)) == Opened(0, 0)
    return answer(device, 1)


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=repr)
def test_the_answer_is_that_of_a_new_session_with_the_settings(before: Sampling, after: Sampling) -> None:
    device = new_device()
    assert device.request(Open(0, 0, Mode.COUPLED, before, PROMPT)) == Opened(0, 0)
    first = device.request(Draft(0, 1, ()))
    assert isinstance(first, Verdict)
    kept = (*PROMPT, first.token_id)
    assert device.request(Extend(0, 2, len(kept), TURN, after)) == Opened(0, 2)
    assert answer(device, 3) == fresh_answer(after, (*kept, *TURN))


def test_mode_ids_keeps_to_temperature_0() -> None:
    device = new_device()
    assert device.request(Open(0, 0, Mode.IDS, GREEDY, PROMPT)) == Opened(0, 0)
    assert device.request(Extend(0, 1, 3, TURN, Sampling(seed=5))) == Opened(0, 1)
    assert answer(device, 2) == fresh_answer(GREEDY, (*PROMPT, *TURN), Mode.IDS)
    refused = new_device()
    refused.request(Open(0, 0, Mode.IDS, GREEDY, PROMPT))
    fault = refused.request(Extend(0, 1, 3, TURN, Sampling(0.7)))
    assert isinstance(fault, Fault)
    assert (fault.code, fault.text) == ("state", "mode 'ids' at temperature 0.7; allowed: temperature 0")


def test_the_settings_hold_until_the_next_change() -> None:
    device, sampling = new_device(), SAMPLINGS[1]
    device.request(Open(0, 0, Mode.COUPLED, GREEDY, PROMPT))
    device.request(Extend(0, 1, 3, (5,), sampling))
    assert device.request(Extend(0, 2, 4, (9, 2))) == Opened(0, 2)
    assert answer(device, 3) == fresh_answer(sampling, (*PROMPT, *TURN))


@pytest.mark.parametrize("copies", [2, 5])
def test_a_repeated_extend_is_answered_again_and_applied_once(copies: int) -> None:
    device, after = new_device(), SAMPLINGS[1]
    device.request(Open(0, 0, Mode.COUPLED, GREEDY, PROMPT))
    for _ in range(copies):
        assert device.request(Extend(0, 1, 3, TURN, after)) == Opened(0, 1)
    first = device.request(Draft(0, 2, ()))
    assert device.request(Extend(0, 1, 3, TURN, after)) == Opened(0, 1)
    assert device.request(Draft(0, 2, ())) == first
    assert isinstance(first, Verdict)
    assert [first.token_id, *answer(device, 3, 11)] == fresh_answer(after, (*PROMPT, *TURN))


def test_another_extend_of_the_same_round_changes_nothing() -> None:
    device = new_device()
    device.request(Open(0, 0, Mode.COUPLED, GREEDY, PROMPT))
    device.request(Extend(0, 1, 3, TURN, SAMPLINGS[1]))
    assert device.request(Extend(0, 1, 3, TURN, SAMPLINGS[2])) is None
    assert answer(device, 2) == fresh_answer(SAMPLINGS[1], (*PROMPT, *TURN))


def test_a_version_2_device_sends_no_settings_and_keeps_its_own() -> None:
    sampling, station = SAMPLINGS[1], Station(FakeTarget.make(TARGET))
    device = RawDevice(station, greet=False)
    greeting = hello(VOCAB)
    welcome = device.request(type(greeting)(2, VOCAB, greeting.vocabulary_hash, greeting.stop_ids))
    assert len(msgpack.unpackb(station.codec.encode(_expect(welcome)))) <= 12
    device.request(Open(0, 0, Mode.COUPLED, sampling, PROMPT))
    frame = station.codec.encode(Extend(0, 1, 3, TURN))
    assert len(msgpack.unpackb(frame)) == 5
    assert device.send_frame(frame) == Opened(0, 1)
    assert answer(device, 2) == fresh_answer(sampling, (*PROMPT, *TURN))


def test_settings_that_cannot_be_read_end_no_session() -> None:
    device = new_device()
    device.request(Open(0, 0, Mode.COUPLED, GREEDY, PROMPT))
    values = msgpack.unpackb(device.station.codec.encode(Extend(0, 1, 3, TURN)))
    fault = device.send_frame(msgpack.packb([*values, struct.pack("<dIdQ", -1, 0, 1, 0)]))
    assert isinstance(fault, Fault)
    assert (fault.session_id, fault.code) == (None, "frame")
    assert answer(device, 1) == fresh_answer(GREEDY, PROMPT)


def _expect(message: Message | None) -> Message:
    assert message is not None
    return message
