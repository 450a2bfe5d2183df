"""What a device may ask for: each limit has its name, and is told before it is crossed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest
import torch

from basestation.engine import Peer
from basestation.kv_pool import Segment
from basestation.rate_limit import RateLimiter
from basestation.server import Server
from basestation.target_model import TargetModel
from device.session import DraftSettings
from protocol.errors import ContextLengthError, SettingsError
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import Draft, Fault, Mode, Open, Opened, Sampling, Verdict, Welcome
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table, target_alone
from tests.link_pair import Station, join
from tests.raw_device import RawDevice, hello

VOCAB = 12
TARGET = random_table(VOCAB, seed=1)
MODEL = FakeDraftModel.make(blend(TARGET, random_table(VOCAB, seed=2), 0.7))
TIGHT = Limits(max_prompt_len=6, max_draft_len=3, max_uplink_k=5, max_sessions=2, max_requests_per_second=9, window=2)


def opening(session_id: int) -> Open:
    return Open(session_id, 0, Mode.IDS, Sampling(), (1, 2))


def station() -> Station:
    return Station(FakeTarget.make(TARGET), TIGHT)


def test_a_welcome_tells_every_limit() -> None:
    welcome = RawDevice(station(), greet=False).say(hello(VOCAB))
    assert isinstance(welcome, Welcome)
    told = {name: getattr(welcome, name) for name in vars(TIGHT) if name != "idle_timeout"}
    assert told == {name: getattr(TIGHT, name) for name in told}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (DraftSettings(Mode.IDS, Sampling(), 4, 4), "draft-len is 4; allowed: 1 to 3"),
        (DraftSettings(Mode.TOPK, Sampling(), 6, 3), "uplink-k is 6; allowed: 1 to 5"),
    ],
)
def test_a_device_that_was_told_asks_for_no_more(settings: DraftSettings, match: str) -> None:
    client, _ = join(station(), MODEL)
    with pytest.raises(SettingsError, match=match):
        client.open(settings, MODEL, [1, 2])


def test_a_longer_prompt_is_refused_by_the_name_of_the_limit() -> None:
    client, _ = join(station(), MODEL)
    settings, allowed = (
        DraftSettings(Mode.IDS, Sampling(), 4, 3),
        r"at most 6 at once \(the base station's --max-prompt",
    )
    with pytest.raises(ContextLengthError, match=f"7 new tokens.*{allowed}"):
        client.open(settings, MODEL, [1] * 7)
    session = client.open(settings, MODEL, [1] * 6)
    session.extend([1] * 12)
    with pytest.raises(ContextLengthError, match=f"8 new tokens.*{allowed}"):
        session.extend([1] * 12 + [2] * 8)
    fault = RawDevice(Station(FakeTarget.make(TARGET), TIGHT)).send(
        FrameCodec(VOCAB).encode(replace(opening(0), prompt_ids=(1,) * 7))
    )
    assert isinstance(fault, Fault)
    assert (fault.code, fault.text) == ("limit", "7 where the base station's --max-prompt-len allows 6")


def test_one_session_too_many_is_refused_and_the_others_go_on() -> None:
    device = RawDevice(station())
    assert [device.say(opening(number)) for number in (0, 1)] == [Opened(0, 0), Opened(1, 0)]
    fault = device.say(opening(2))
    assert isinstance(fault, Fault)
    assert (fault.session_id, fault.code) == (2, "limit")
    assert fault.text == "3 where the base station's --max-sessions allows 2"
    assert device.say(Draft(1, 1, ())) == Verdict(1, 1, 0, target_alone(TARGET, (1, 2), 1)[0])
    assert RawDevice(device.station, b"b").say(opening(0)) == Opened(0, 0)


@pytest.mark.parametrize("name", list(vars(TIGHT)))
def test_a_limit_below_one_is_refused_with_its_name(name: str) -> None:
    with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')} is 0; allowed: 1 and more"):
        replace(TIGHT, **{name: 0})


# -- the rate of requests --


def allowed(flow: RateLimiter, name: str, messages: int) -> int:
    return sum(flow.allows(name) for _ in range(messages))


def test_a_burst_is_taken_and_then_the_rate() -> None:
    now = 0.0
    flow = RateLimiter(10, clock=lambda: now)
    assert allowed(flow, "a", 100) == 40  # four seconds' worth
    now = 1.0
    assert allowed(flow, "a", 100) == 10
    now = 1000.0
    assert allowed(flow, "a", 100) == 40
    assert allowed(flow, "b", 100) == 40  # another sender's bucket is its own


def test_a_sender_of_too_much_is_told_once_a_second() -> None:
    now = 0.0
    flow = RateLimiter(1, clock=lambda: now)
    allowed(flow, "a", 5)
    assert [flow.should_notify("a") for _ in range(3)] == [True, False, False]
    now = 1.0
    assert flow.should_notify("a")


def test_forgotten_senders_take_no_memory() -> None:
    flow = RateLimiter(1)
    for number in range(10_100):
        flow.allows(str(number))
    assert len(vars(flow)["_senders"]) == 10_000


@pytest.mark.timeout(30)
def test_an_endless_stream_of_requests_does_not_stop_the_passes() -> None:
    target = FakeTarget(TARGET)
    server = Server(cast(TargetModel, target), "tcp://127.0.0.1:0")
    peer, forward = Peer.without_key(b"a"), target.forward

    def last_pass(segments: Sequence[Segment]) -> torch.Tensor:
        server.stop()
        return forward(segments)

    def again() -> None:
        server._inbox.put(again)

    target.forward = last_pass  # type: ignore[method-assign]
    for message in (hello(VOCAB), opening(0), Draft(0, 1, ())):
        server._engine.receive(peer, message)
    server._inbox.put(again)
    server.serve()
    assert target.passes == [1]
