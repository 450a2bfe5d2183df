"""Resume: a session with the same tokens continues, another is opened again; the answer is the same."""

import pytest

from basestation.devices.peer import Peer
from basestation.engine.engine import Engine
from basestation.engine.scheduler import PassBudget
from device.settings import DraftSettings
from protocol.limits import Limits
from protocol.messages import Draft, Fault, Message, Mode, Open, Opened, Resume, Resumed, Sampling, Verdict
from tests.fakes import DRAFT, TARGET, VOCAB, FakeDraftModel, FakeTarget, target_alone
from tests.link_pair import IDS, MemoryTransport, Station, join, open_session
from tests.raw_device import RawDevice, hello

PROMPT = (3, 1, 4)
OWN = target_alone(TARGET, PROMPT, 40)
OPEN = Open(0, 0, Mode.IDS, Sampling(), PROMPT)
FIRST, SECOND = Draft(0, 1, (OWN[0],)), Draft(0, 2, (OWN[2],))


def opened() -> RawDevice:
    device = RawDevice(Station(FakeTarget.make(TARGET)))
    assert device.request(OPEN) == Opened(0, 0)
    return device


def test_a_session_with_the_same_tokens_is_resumed() -> None:
    device = opened()
    assert device.request(Resume.of(0, 1, PROMPT)) == Resumed(0, 1, 3)
    device.request(FIRST)
    assert device.request(Resume.of(0, 2, (*PROMPT, *OWN[:2]))) == Resumed(0, 2, 5)
    assert device.request(SECOND) == Verdict(0, 2, 1, OWN[3])


def test_a_device_that_missed_a_verdict_resumes_and_gets_it_again() -> None:
    device = opened()
    verdict = device.request(FIRST)
    assert device.request(Resume.of(0, 1, PROMPT)) == Resumed(0, 2, 5)
    assert device.request(FIRST) == verdict


@pytest.mark.parametrize(
    "resume",
    [Resume.of(0, 2, (*PROMPT, OWN[0], 1 + OWN[1])), Resume.of(0, 2, (*PROMPT, *OWN[:3])), Resume.of(1, 1, PROMPT)],
    ids=["other tokens", "more tokens", "no such session"],
)
def test_a_session_with_other_tokens_is_unknown(resume: Resume) -> None:
    device = opened()
    device.request(FIRST)
    fault = device.request(resume)
    assert isinstance(fault, Fault)
    assert (fault.session_id, fault.code) == (resume.session_id, "unknown_session")


def test_a_device_too_far_behind_is_unknown() -> None:
    device, tokens = opened(), [*PROMPT]
    for round_id in range(1, 4 + Limits.window):
        device.request(Draft(0, round_id, ()))
    fault = device.request(Resume.of(0, 1, tokens))
    assert isinstance(fault, Fault)


def test_replies_go_to_the_address_that_resumed() -> None:
    delivered: list[tuple[bytes, Message]] = []

    def deliver(address: bytes, message: Message) -> int:
        delivered.append((address, message))
        return 0

    engine = Engine(FakeTarget.make(TARGET), Limits(), PassBudget(), deliver)
    before, after = Peer("key", b"before"), Peer("key", b"after")
    for message in (hello(VOCAB), OPEN, FIRST):
        engine.receive(before, message)
    engine.receive(after, Resume.of(0, 1, PROMPT))
    engine.step()
    assert delivered[-2:] == [(b"after", Resumed(0, 1, 3)), (b"after", Verdict(0, 1, 1, OWN[1]))]


def test_an_extend_whose_reply_is_lost_keeps_the_session() -> None:
    station, model = Station(FakeTarget.make(TARGET)), FakeDraftModel.make(DRAFT)
    lost: list[Message] = []

    def down(message: Message) -> int:
        if isinstance(message, Opened) and message.round_id > 0 and not lost:
            lost.append(message)
            transport.connections += 1
            return 0
        return 1

    transport = MemoryTransport(station, down=down)
    client, _ = join(station, model, transport)
    session = open_session(client, IDS, model, [*PROMPT])
    list(session.answer(10))
    session.extend([*PROMPT, 7, 8])
    assert [token.token_id for token in session.answer(10)] == target_alone(TARGET, [*PROMPT, 7, 8], 10)
    assert lost
    assert sum(isinstance(station.codec.decode(frame), Open) for frame in transport.uplink) == 1


class BreakingTransport(MemoryTransport):
    """A link whose connection breaks at every third send; frames in flight are lost."""

    sends = 0

    def send(self, frame: bytes) -> None:
        self.sends += 1
        if self.sends % 3 == 0:
            self.connections += 1
            self.uplink.append(frame)
            return
        super().send(frame)


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.IDS])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_device_resumes_over_every_new_connection(mode: Mode, temperature: float) -> None:
    answers, resumed = [], 0
    for kind in (MemoryTransport, BreakingTransport):
        station, model = Station(FakeTarget.make(TARGET)), FakeDraftModel.make(DRAFT)
        transport = kind(station)
        client, _ = join(station, model, transport)
        session = open_session(client, DraftSettings(mode, Sampling(temperature, seed=3), 4, 4), model, [*PROMPT])
        answers.append([token.token_id for token in session.answer(30)])
        resumed = sum(isinstance(station.codec.decode(frame), Resume) for frame in transport.uplink)
    assert answers[0] == answers[1]
    assert resumed > 0 or mode is Mode.TARGET
