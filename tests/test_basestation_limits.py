"""Limits of a device's requests: the Welcome tells them, and a Fault names the one that was exceeded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest
import torch

from basestation.devices.peer import Peer
from basestation.devices.rate_limit import RateLimiter
from basestation.kv_cache.kv_pool import PAGE_SIZE
from basestation.server import Server
from basestation.target.segment import Segment
from basestation.target.target_model import TargetModel
from common.grammar import GrammarCompiler
from device.settings import DraftSettings
from protocol.errors import ContextLengthError, SettingsError
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import Decode, Draft, Fault, Mode, Open, Opened, Sampling, Verdict, Welcome
from tests.fakes import DRAFT, TARGET, VOCAB, FakeDraftModel, FakeTarget, target_alone
from tests.link_pair import Station, join, open_session
from tests.raw_device import RawDevice, hello
from tests.serving import ANY_PORT

MODEL = FakeDraftModel.make(DRAFT)
TIGHT = Limits(max_prompt_len=6, max_draft_len=3, max_uplink_k=5, max_sessions=2, max_requests_per_second=9, window=2)


def opening(session_id: int) -> Open:
    return Open(session_id, 0, Mode.IDS, Sampling(), (1, 2))


def station() -> Station:
    compiler = GrammarCompiler.of_tokenizer("{}", VOCAB, frozenset())  # not used
    return Station(FakeTarget.make(TARGET, grammar_compiler=compiler), TIGHT)


def test_a_welcome_contains_every_limit_that_a_device_can_respect() -> None:
    welcome = RawDevice(station(), greet=False).request(hello(VOCAB))
    assert isinstance(welcome, Welcome)
    of_the_base_station = {"idle_timeout", "max_bytes_per_second", "max_held_bytes"}
    told = {name: getattr(welcome, name) for name in set(vars(TIGHT)) - of_the_base_station}
    assert told == {name: getattr(TIGHT, name) for name in told}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (DraftSettings(Mode.IDS, Sampling(), 4, 4), "draft-len is 4; allowed: 1 to 3"),
        (DraftSettings(Mode.TOPK, Sampling(), 6, 3), "uplink-k is 6; allowed: 1 to 5"),
    ],
)
def test_a_device_respects_the_limits_of_the_welcome(settings: DraftSettings, match: str) -> None:
    client, _ = join(station(), MODEL)
    with pytest.raises(SettingsError, match=match):
        open_session(client, settings, MODEL, [1, 2])


def test_a_prompt_that_is_too_long_is_refused_with_the_limits_name() -> None:
    client, _ = join(station(), MODEL)
    settings, allowed = (
        DraftSettings(Mode.IDS, Sampling(), 4, 3),
        r"at most 6 at once \(the base station's --max-prompt",
    )
    with pytest.raises(ContextLengthError, match=f"7 new tokens.*{allowed}"):
        open_session(client, settings, MODEL, [1] * 7)
    session = open_session(client, settings, MODEL, [1] * 6)
    session.extend([1] * 12)
    with pytest.raises(ContextLengthError, match=f"8 new tokens.*{allowed}"):
        session.extend([1] * 12 + [2] * 8)
    fault = RawDevice(Station(FakeTarget.make(TARGET), TIGHT)).send_frame(
        FrameCodec(VOCAB).encode(replace(opening(0), prompt_ids=(1,) * 7))
    )
    assert isinstance(fault, Fault)
    assert (fault.code, fault.text) == ("limit", "7 exceeds the base station's --max-prompt-len of 6")


def test_one_active_session_too_many_is_told_to_retry_and_the_others_continue() -> None:
    device = RawDevice(station())
    assert [device.request(opening(number)) for number in (0, 1)] == [Opened(0, 0), Opened(1, 0)]
    fault = device.request(opening(2))
    assert isinstance(fault, Fault)
    assert (fault.session_id, fault.code, fault.retry_seconds) == (2, "full", 5)
    assert fault.text == "2 sessions of this device are active, all that --max-sessions allows; retry in 5 s"
    assert device.request(Draft(1, 1, ())) == Verdict(1, 1, 0, target_alone(TARGET, (1, 2), 1)[0])
    assert RawDevice(device.station, b"b").request(opening(0)) == Opened(0, 0)


def test_the_longest_idle_session_makes_room_for_another_of_its_device() -> None:
    device = RawDevice(station())
    stranger = RawDevice(device.station, b"b")
    for each, numbers in ((stranger, (0,)), (device, (0, 1))):
        for number in numbers:
            assert each.request(opening(number)) == Opened(number, 0)
            assert each.receive() is None  # the prompt is prefilled
            device.station.now += 6
    assert device.request(opening(2)) == Opened(2, 0)
    token_id = target_alone(TARGET, (1, 2), 1)[0]
    assert device.request(Draft(1, 1, ())) == Verdict(1, 1, 0, token_id)
    assert stranger.request(Draft(0, 1, ())) == Verdict(0, 1, 0, token_id)
    fault = device.request(Draft(0, 1, ()))
    assert isinstance(fault, Fault)
    assert fault.code == "unknown_session"


def test_an_open_that_is_refused_drops_no_idle_session() -> None:
    station = Station(FakeTarget.make(TARGET, capacity=2 * PAGE_SIZE), TIGHT)
    device, strangers = RawDevice(station), [RawDevice(station, peer) for peer in (b"b", b"c")]
    for number in (0, 1):
        assert device.request(opening(number)) == Opened(number, 0)
        assert device.receive() is None  # the prompt is prefilled
        station.now += 6
    for stranger in strangers:
        assert stranger.request(opening(0)) == Opened(0, 0)
    fault = device.request(opening(2))
    assert isinstance(fault, Fault)
    assert fault.text.startswith("the base station is full (busy sessions: 2)")
    for number in (0, 1):
        assert device.request(Draft(number, 1, ())) == Verdict(number, 1, 0, target_alone(TARGET, (1, 2), 1)[0])


def test_a_device_continues_in_a_session_that_made_room_for_another() -> None:
    crowded = station()
    client, _ = join(crowded, MODEL)
    settings = DraftSettings(Mode.IDS, Sampling(), 4, 3)
    sessions = [open_session(client, settings, MODEL, [1, 2]) for _ in range(2)]
    crowded.now += 6
    sessions.append(open_session(client, settings, MODEL, [1, 2]))
    for session in sessions:
        crowded.now += 6
        assert [token.token_id for token in session.answer(8)] == target_alone(TARGET, (1, 2), 8)


@pytest.mark.parametrize("name", list(vars(TIGHT)))
def test_a_limit_below_one_is_refused_with_its_name(name: str) -> None:
    with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')} is 0; allowed: 1 or more"):
        replace(TIGHT, **{name: 0})


# -- rate limit --


def count_allowed(limiter: RateLimiter, name: str, messages: int) -> int:
    return sum(limiter.allows(name) for _ in range(messages))


def test_a_burst_is_allowed_and_then_the_rate() -> None:
    now = 0.0
    limiter = RateLimiter(10, clock=lambda: now)
    assert count_allowed(limiter, "a", 100) == 40  # four seconds' worth
    now = 1.0
    assert count_allowed(limiter, "a", 100) == 10
    now = 1000.0
    assert count_allowed(limiter, "a", 100) == 40
    assert count_allowed(limiter, "b", 100) == 40  # another sender's bucket is its own


def test_a_limited_sender_is_notified_once_a_second() -> None:
    now = 0.0
    limiter = RateLimiter(1, clock=lambda: now)
    count_allowed(limiter, "a", 5)
    assert [limiter.should_notify("a") for _ in range(3)] == [True, False, False]
    now = 1.0
    assert limiter.should_notify("a")


def test_the_number_of_remembered_senders_is_bounded() -> None:
    limiter = RateLimiter(1)
    for number in range(10_100):
        limiter.allows(str(number))
    assert len(vars(limiter)["_senders"]) == 10_000


@pytest.mark.timeout(30)
def test_an_endless_stream_of_requests_does_not_stop_forward_passes() -> None:
    target = FakeTarget(TARGET)
    server = Server(cast(TargetModel, target), ANY_PORT)
    peer, forward = Peer.without_key(b"a"), target.forward

    def stop_and_forward(segments: Sequence[Segment]) -> torch.Tensor:
        server.stop()
        return forward(segments)

    def enqueue_again() -> None:
        server._inbox.put(enqueue_again)

    target.forward = stop_and_forward  # type: ignore[method-assign]
    for message in (hello(VOCAB), opening(0), Draft(0, 1, ())):
        server._engine.receive(peer, message)
    server._inbox.put(enqueue_again)
    server.serve()
    assert target.passes == [1]


def test_the_replies_that_a_decode_will_store_count_as_held() -> None:
    limits = Limits(max_held_bytes=100_000)
    served = Station(FakeTarget.make(TARGET, capacity=2**20, context_length=2**20), limits)
    codec = FrameCodec(len(TARGET), limits)
    told = Sampling(logprobs=5)
    for message in (hello(len(TARGET)), Open(0, 0, Mode.TARGET, told, (1,)), Decode(0, 1, 500), Decode(0, 501, 5000)):
        served.push(b"a", codec.encode(message))
        while served.engine.busy:
            served.engine.step()
    (fault,) = [message for message in served.outboxes[b"a"] if isinstance(message, Fault)]
    assert (fault.code, fault.session_id) == ("limit", 0)
    assert "--max-held-bytes of 100000" in fault.text


def test_the_replies_that_are_due_to_other_decodes_count_as_held() -> None:
    limits = Limits(max_held_bytes=100_000)
    served = Station(FakeTarget.make(TARGET, capacity=2**20, context_length=2**20), limits)
    codec = FrameCodec(len(TARGET), limits)
    served.push(b"a", codec.encode(hello(len(TARGET))))
    for number in range(3):
        served.push(b"a", codec.encode(Open(number, 0, Mode.TARGET, Sampling(logprobs=5), (1,))))
    for number in range(3):
        served.push(b"a", codec.encode(Decode(number, 1, 400)))
    faults = [message for message in served.outboxes[b"a"] if isinstance(message, Fault)]
    assert [(fault.code, fault.session_id) for fault in faults] == [("limit", 1), ("limit", 2)]
