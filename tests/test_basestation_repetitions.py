"""A repeated request gets its replies again, within its device's rate limit and from the round that it resumed at."""

from dataclasses import replace

from basestation.sessions.held_bytes import held_bytes
from protocol.limits import Limits
from protocol.messages import Close, Decode, Extend, Message, Mode, Open, Opened, Resume, Resumed, Sampling, Verdict
from tests.fakes import TARGET, FakeTarget, target_alone
from tests.link_pair import Station
from tests.raw_device import RawDevice
from tests.scripted_device import settle

PROMPT = (3, 1, 4)
COUNT = 300
OWN = target_alone(TARGET, PROMPT, COUNT)
DECODE = Decode(0, 1, COUNT)
LIMITS = Limits(max_requests_per_second=100)
BURST = 4 * LIMITS.max_requests_per_second


def decoded() -> RawDevice:
    """A device whose session decoded ``COUNT`` tokens, and received them."""
    station = Station(FakeTarget.make(TARGET, stop_ids=frozenset()), LIMITS)
    device = RawDevice(station)
    assert device.request(Open(0, 0, Mode.TARGET, Sampling(), PROMPT)) == Opened(0, 0)
    station.push(device.peer, station.codec.encode(DECODE))
    settle(station)
    assert received(device) == verdicts(0)
    return device


def verdicts(start: int) -> list[Verdict]:
    return [Verdict(0, 1 + index, 0, token_id) for index, token_id in enumerate(OWN)][start:]


def received(device: RawDevice) -> list[Message]:
    outbox = device.station.outboxes[device.peer]
    messages = list(outbox)
    outbox.clear()
    return messages


def push(device: RawDevice, message: Message, copies: int = 1) -> list[Message]:
    for _ in range(copies):
        device.station.push(device.peer, device.station.codec.encode(message))
    return received(device)


def test_a_repeated_decode_is_answered_again() -> None:
    assert push(decoded(), DECODE) == verdicts(0)


def test_after_a_resume_only_what_the_device_has_not_received_is_sent_again() -> None:
    device = decoded()
    committed = 3 + 290
    resume = Resume.of(0, 291, [*PROMPT, *OWN][:committed])
    assert push(device, resume) == [Resumed(0, 301, 303)]
    assert push(device, DECODE) == verdicts(290)


def test_repetitions_send_no_more_replies_than_the_rate_limit_allows() -> None:
    device = decoded()
    assert len(push(device, DECODE, copies=50)) == BURST
    device.station.now += 1.0
    assert len(push(device, DECODE, copies=50)) == LIMITS.max_requests_per_second


def test_another_device_gets_its_replies_while_one_has_used_up_its_limit() -> None:
    device = decoded()
    push(device, DECODE, copies=50)
    other = RawDevice(device.station, b"b")
    opening = Open(0, 0, Mode.TARGET, Sampling(), PROMPT)
    assert [other.request(opening) for _ in range(2)] == [Opened(0, 0)] * 2


def test_a_device_that_used_up_its_limit_still_gets_replies_to_new_requests() -> None:
    device = decoded()
    push(device, DECODE, copies=50)
    assert device.request(Extend(0, 301, 303, (5,))) == Opened(0, 301)
    assert push(device, Close(0)) == []


def test_requests_that_differ_only_in_their_kind_or_tokens_are_no_repetitions() -> None:
    device = decoded()
    assert device.request(Extend(0, 301, 303, (5,))) == Opened(0, 301)
    for other in (Extend(0, 301, 303, (6,)), Decode(0, 301, 303), replace(DECODE, count=COUNT - 1)):
        assert push(device, other) == []


def test_what_a_session_holds_is_a_few_bytes_a_token() -> None:
    device = decoded()
    (session,) = vars(device.station.engine)["_sessions"].all()
    assert session.held_bytes <= 12 * (len(PROMPT) + COUNT)
    assert held_bytes(DECODE) == 0
