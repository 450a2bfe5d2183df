"""Invariant 7: bad input ends one session at worst, with a named Fault and a log line."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from device.settings import DraftSettings
from protocol.errors import FaultError
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import Decode, Draft, Extend, Fault, Opened, Sampling, Verdict, Welcome
from tests.fakes import TARGET, VOCAB, target_alone
from tests.invariants import (
    MAX_NEW_TOKENS,
    PROMPT,
    SAMPLED_SETTINGS,
    SETTINGS,
    answer,
    draft_model,
    new_station,
    open_request,
    settings_name,
    token_ids_of,
)
from tests.link_pair import MemoryTransport, join, open_session
from tests.raw_device import CODEC, RawDevice

BAD = {
    "garbage": (b"\xc1\x00garbage", None, "frame"),
    "a damaged message": (CODEC.encode(Draft(0, 1, (1, 2)))[:-1], None, "frame"),
    "an unknown token": (FrameCodec(VOCAB + 1).encode(Draft(0, 1, (VOCAB,))), None, "frame"),
    "a session that is not open": (CODEC.encode(Draft(5, 1, (1,))), 5, "unknown_session"),
    "a round beyond the window": (CODEC.encode(Draft(0, 1 + Limits.window, (1,))), 0, "state"),
    "a second Open": (CODEC.encode(replace(open_request(), round_id=1)), 0, "state"),
    "an Extend beyond the end": (CODEC.encode(Extend(0, 1, 20, (1,))), 0, "state"),
    "an empty Extend": (CODEC.encode(Extend(0, 1, 2, ())), 0, "state"),
    "an Extend with a temperature in mode ids": (
        CODEC.encode(Extend(0, 1, 2, (1,), Sampling(0.7))),
        0,
        "state",
    ),
    "a Decode of no tokens": (CODEC.encode(Decode(0, 1, 0)), 0, "state"),
    "a Decode beyond the context": (CODEC.encode(Decode(0, 1, 2**32 - 1)), 0, "state"),
    "a Draft beyond the context": (CODEC.encode(Draft(0, 1, (1,) * 62)), 0, "state"),
    "a prompt beyond the context": (
        CODEC.encode(replace(open_request(session_id=1), prompt_ids=(1,) * 64)),
        1,
        "context_length",
    ),
    "a turn beyond the context": (CODEC.encode(Extend(0, 1, 8, (1,) * 56)), 0, "context_length"),
    "a Verdict": (CODEC.encode(Verdict(0, 1, 0, 1)), 0, "state"),
    "a Welcome": (CODEC.encode(Welcome(1, "x", 1, 1, ())), None, "state"),
}


@pytest.mark.parametrize(("frame", "session_id", "code"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("settings", [SETTINGS[0], SAMPLED_SETTINGS[0]], ids=settings_name)
def test_bad_input_ends_one_session_at_worst(
    settings: DraftSettings, frame: bytes, session_id: int | None, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    station, model = new_station(context_length=64), draft_model()
    client, _ = join(station, model)
    stream = open_session(client, settings, model, PROMPT).answer(MAX_NEW_TOKENS)
    tokens = [next(stream).token_id]
    bad = RawDevice(station, b"b")
    assert bad.request(open_request()) == Opened(0, 0)
    neighbour = RawDevice(station, b"c")
    assert neighbour.request(open_request()) == Opened(0, 0)
    with caplog.at_level(logging.WARNING, "basestation"):
        fault = bad.send_frame(frame)
    assert isinstance(fault, Fault)
    assert (fault.session_id, fault.code) == (session_id, code)
    assert fault.text
    assert len(caplog.records) == 1
    assert fault.text in caplog.text
    tokens += [token.token_id for token in stream]
    assert tokens == answer(settings)
    expected = Verdict(0, 1, 0, target_alone(TARGET, PROMPT, 1)[0])
    assert neighbour.request(Draft(0, 1, ())) == expected
    reply = bad.request(Draft(0, 1, ()))
    if session_id == 0:
        assert isinstance(reply, Fault)
        assert (reply.session_id, reply.code) == (0, "unknown_session")
        assert bad.request(open_request()) == Opened(0, 0)
        assert bad.request(Draft(0, 1, ())) == expected
    else:
        assert reply == expected


def test_garbage_frames_do_not_change_another_answer() -> None:
    station, model = new_station(), draft_model()
    client, _ = join(station, model)
    rng, tokens = np.random.default_rng(0), []
    for token in open_session(client, SAMPLED_SETTINGS[0], model, PROMPT).answer(MAX_NEW_TOKENS):
        tokens.append(token.token_id)
        for _ in range(20):
            station.push(b"b", rng.bytes(int(rng.integers(0, 40))))
    assert tokens == answer(SAMPLED_SETTINGS[0])
    assert {type(message) for message in station.outboxes[b"b"]} == {Fault}


def test_the_fault_of_one_session_does_not_end_another_of_the_same_device() -> None:
    station, models = new_station(), [draft_model(), draft_model()]
    client, _ = join(station, models[0], MemoryTransport(station, down=lambda message: 1 + isinstance(message, Fault)))
    lost, kept = (open_session(client, SETTINGS[0], model, PROMPT) for model in models)
    station.push(b"a", CODEC.encode(Draft(0, 9, ())))
    with pytest.raises(FaultError, match="round 9; expected round 1"):
        token_ids_of(lost)
    assert token_ids_of(kept) == target_alone(TARGET, PROMPT, MAX_NEW_TOKENS)


def test_a_fault_reaches_the_user_with_its_code() -> None:
    station, model = new_station(), draft_model()
    client, _ = join(station, model)
    session = open_session(client, SETTINGS[0], model, PROMPT)
    station.push(b"a", CODEC.encode(Draft(0, 9, ())))
    with pytest.raises(FaultError, match="round 9; expected round 1") as caught:
        token_ids_of(session)
    assert caught.value.fault_code == "state"
