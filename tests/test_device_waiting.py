"""A device waits where the base station is full or being stopped; the answer is the one it would have been."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import cast

import pytest

from basestation.kv_pool import KVPool
from basestation.server import Server
from bench.setup.bench_setup import bench_setup
from bench.setup.prompts import OWN_PROMPTS
from bench.setup.station_process import running_station
from device.client import Client, Timeouts
from device.link import Link
from device.planner import TRIAL
from device.session import DeviceSession, DraftSettings
from protocol.errors import ClosingError, FaultError, FullError
from protocol.frames import FrameCodec
from protocol.messages import Decode, Draft, Fault, Hello, Message, Mode, Open, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table
from tests.link_pair import MemoryTransport, RefusingTransport, Station, TimedTransport, join
from tests.sample import BUNDLE, SAMPLE
from tests.serving import serving

TARGET = random_table(20, seed=1)
DRAFT = blend(TARGET, random_table(20, seed=2), 0.7)
PROMPT = [3, 1, 4, 1, 5]
STEP = KVPool.rounded(1)
COUNT = 40
SETTINGS = [
    DraftSettings(mode, sampling, uplink_k=4, draft_len=4)
    for mode in Mode
    for sampling in (Sampling(), Sampling(1.0, seed=3))
    if mode is not Mode.IDS or sampling.greedy
]
every_mode = pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: f"{one.mode}-{one.sampling.temperature:g}")


def new_station(capacity: int = 3 * STEP) -> Station:
    return Station(FakeTarget.make(TARGET, capacity=capacity))


def open_at(transport: MemoryTransport, settings: DraftSettings, prompt: list[int] = PROMPT) -> DeviceSession:
    model = FakeDraftModel.make(DRAFT)
    return join(transport.station, model, transport)[0].open(settings, model, prompt)


def answer_of(session: DeviceSession) -> list[int]:
    return [token.token_id for token in session.answer(COUNT)]


def undisturbed(settings: DraftSettings) -> list[int]:
    return answer_of(open_at(MemoryTransport(new_station()), settings))


def occupy(station: Station) -> DeviceSession:
    """Another device's session that takes all there is, as long as it counts as busy."""
    return open_at(MemoryTransport(station, peer=b"b"), SETTINGS[0], PROMPT * (2 * STEP // len(PROMPT) + 1))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the device logged."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("device")]


def waits_of(transport: RefusingTransport) -> list[float]:
    moments = [*transport.refused_at, transport.now]
    return [later - before for before, later in pairwise(moments)]


@every_mode
def test_a_device_gets_in_once_there_is_room(settings: DraftSettings, caplog: pytest.LogCaptureFixture) -> None:
    expected = undisturbed(settings)
    station = new_station()
    occupy(station)
    transport = TimedTransport(station)
    assert answer_of(open_at(transport, settings)) == expected
    assert 5 <= transport.now < 12
    (line,) = told(caplog)
    assert line.startswith("waiting for up to 60 s: the base station is full (busy sessions: 1); come back in ")


@every_mode
def test_a_round_that_is_refused_is_asked_again(settings: DraftSettings) -> None:
    expected = undisturbed(settings)
    station = new_station()
    target = cast(FakeTarget, station.engine._target)
    transport = TimedTransport(station)
    stream = open_at(transport, settings).answer(COUNT)
    tokens = [next(stream).token_id for _ in range(COUNT // 2)]
    target.memory = 0

    def until_there_is_memory(_: Message) -> int:
        target.memory = 0 if transport.now < 7 else None
        return 1

    transport.up = until_there_is_memory
    tokens += [token.token_id for token in stream]
    assert tokens == expected
    assert transport.now > 7


@pytest.mark.parametrize("code", [FullError.code, ClosingError.code])
def test_pauses_grow_up_to_that_of_repetitions(code: str) -> None:
    transport = RefusingTransport(new_station())
    transport.code, transport.opens_at = code, 30.0
    assert answer_of(open_at(transport, SETTINGS[0])) == undisturbed(SETTINGS[0])
    waits = waits_of(transport)
    assert 1 <= waits[0] <= 1.25
    assert all(later >= before / 1.25 for before, later in pairwise(waits))
    assert max(waits) <= Timeouts().repeat * 1.25
    assert waits[-1] >= Timeouts().repeat


def test_a_pause_is_as_long_as_the_base_station_says() -> None:
    transport = RefusingTransport(new_station())
    transport.opens_at, transport.retry_seconds = 20.0, 9
    answer_of(open_at(transport, SETTINGS[0]))
    waits = waits_of(transport)
    assert len(waits) >= 2
    assert all(9 <= wait <= 9 * 1.25 for wait in waits)


@pytest.mark.parametrize("code", [FullError.code, ClosingError.code])
@pytest.mark.parametrize("retry_seconds", [0, 7])
def test_patience_ends_with_what_the_base_station_said(code: str, retry_seconds: int) -> None:
    transport = RefusingTransport(new_station())
    transport.code, transport.opens_at, transport.retry_seconds = code, 1e9, retry_seconds
    with pytest.raises(FaultError, match=r"no room \(waited \d\d s\)") as caught:
        open_at(transport, SETTINGS[0])
    assert caught.value.fault_code == code
    assert caught.value.retry_seconds == (retry_seconds or Timeouts().repeat)
    assert Timeouts().reply - 10 < transport.now <= Timeouts().reply


def test_a_time_beyond_the_patience_is_not_waited_for() -> None:
    transport = RefusingTransport(new_station())
    transport.opens_at, transport.retry_seconds = 1e9, 3600
    with pytest.raises(FaultError, match=r"no room \(waited 0 s\)") as caught:
        open_at(transport, SETTINGS[0])
    assert caught.value.retry_seconds == 3600
    assert transport.now == 0


def test_what_was_waited_is_not_taken_for_the_links_delay() -> None:
    transport = RefusingTransport(new_station())
    transport.opens_at = 30.0
    model = FakeDraftModel.make(DRAFT)
    client, _ = join(transport.station, model, transport)
    settings = DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=None)
    stream = client.open(settings, model, PROMPT).answer(TRIAL)
    assert len(list(stream)) == TRIAL
    assert transport.now >= 30
    assert client.planner(settings, model.manifest).times.round_trip_seconds < 1e-6


class RestartedTransport(RefusingTransport):
    """A base station that says that it is closing in the middle of an answer, and takes 30 s to be there again."""

    greeted = False

    def send(self, frame: bytes) -> None:
        message = self.station.codec.decode(frame)
        if isinstance(message, Draft | Decode) and message.session_id == 0 and message.round_id > 1:
            self.station.outboxes[self.peer].append(Fault(0, ClosingError.code, "shutting down"))
            return
        if isinstance(message, Hello) and self.greeted:
            self.now += 30
        self.greeted = self.greeted or isinstance(message, Hello)
        super().send(frame)


def test_the_time_that_a_base_station_takes_to_come_back_is_not_taken_for_the_links_delay() -> None:
    transport = RestartedTransport(new_station())
    model = FakeDraftModel.make(DRAFT)
    client, _ = join(transport.station, model, transport)
    settings = DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=None)
    assert len(answer_of(client.open(settings, model, PROMPT))) == COUNT
    assert transport.now >= 31
    assert client.planner(settings, model.manifest).times.seconds(8) < 1e-6


class ForgettingTransport(TimedTransport):
    """A base station that opens every session and knows none."""

    opened = 0

    def send(self, frame: bytes) -> None:
        message = self.station.codec.decode(frame)
        self.opened += isinstance(message, Open)
        if isinstance(message, Draft | Decode):
            self.station.outboxes[self.peer].append(Fault(message.session_id, "unknown_session", "not open"))
        else:
            super().send(frame)


def test_a_base_station_that_forgets_every_session_is_not_asked_for_ever() -> None:
    transport = ForgettingTransport(new_station())
    session = open_at(transport, SETTINGS[0])
    with pytest.raises(FaultError, match=r"not open \(waited \d\d s\)"):
        answer_of(session)
    assert Timeouts().reply - 10 < transport.now <= Timeouts().reply
    assert transport.opened < 25


class RefusedRoundTransport(RefusingTransport):
    """First a round is refused, and then every session."""

    def send(self, frame: bytes) -> None:
        message = self.station.codec.decode(frame)
        if isinstance(message, Draft | Decode) and self.now < 50:
            self.opens_at = 1e9
            self.now += 30
            self.station.outboxes[self.peer].append(Fault(message.session_id, FullError.code, "no memory", 40))
        else:
            super().send(frame)


def test_patience_counts_from_the_first_refusal_whatever_was_refused() -> None:
    transport = RefusedRoundTransport(new_station())
    session = open_at(transport, SETTINGS[0])
    with pytest.raises(FaultError, match="no room"):
        answer_of(session)
    assert transport.now <= 30 + Timeouts().reply


class ReconnectedTransport(RefusingTransport):
    """Three seconds into the first pause, the connection is a new one, to a base station that has room."""

    def receive(self, timeout: float) -> bytes | None:
        if timeout <= Timeouts().repeat or self.connections > 1:
            return super().receive(timeout)
        self.connections = 2
        self.opens_at = self.now = self.now + 3
        return None


def test_a_new_connection_ends_the_pause() -> None:
    transport = ReconnectedTransport(new_station())
    transport.opens_at, transport.retry_seconds = 1e9, 40
    assert answer_of(open_at(transport, SETTINGS[0])) == undisturbed(SETTINGS[0])
    assert transport.now == 3


@every_mode
def test_a_station_that_was_stopped_may_be_replaced(settings: DraftSettings) -> None:
    expected = undisturbed(settings)
    transport = TimedTransport(new_station())
    session = open_at(transport, settings)
    stream = session.answer(COUNT)
    tokens = [next(stream).token_id for _ in range(COUNT // 2)]
    gone = transport.station
    gone.engine.close()

    def until_it_is_replaced(message: Message) -> int:
        if transport.now > 20 and transport.station is gone:
            transport.station = new_station()
        return int(transport.station is not gone)

    transport.up = until_it_is_replaced
    tokens += [token.token_id for token in stream]
    assert tokens == expected
    assert transport.now > 20


# -- on a real socket --


@contextmanager
def client_at(address: str, patience: Timeouts) -> Iterator[Client]:
    link = Link.connect(address, FrameCodec(len(DRAFT)))
    try:
        yield Client(link, FakeDraftModel.make(DRAFT).manifest, patience)
    finally:
        link.close()


def new_server(bind: str = "tcp://127.0.0.1:0") -> Server:
    return Server(FakeTarget.make(TARGET, capacity=3 * STEP), bind)


def test_a_device_on_a_socket_gets_in_when_another_leaves(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving(new_server()))
        first, second = (stack.enter_context(client_at(server.address, Timeouts())) for _ in range(2))
        occupant = first.open(SETTINGS[0], FakeDraftModel.make(DRAFT), PROMPT * (2 * STEP // len(PROMPT) + 1))
        threading.Timer(0.5, occupant.close).start()
        assert answer_of(second.open(SETTINGS[0], FakeDraftModel.make(DRAFT), PROMPT)) == undisturbed(SETTINGS[0])
    assert len(told(caplog)) == 1


def test_a_device_on_a_socket_finds_the_station_that_follows(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        with serving(new_server()) as old:
            address = old.address
            client = stack.enter_context(client_at(address, Timeouts()))
            stream = client.open(SETTINGS[0], FakeDraftModel.make(DRAFT), PROMPT).answer(COUNT)
            tokens = [next(stream).token_id for _ in range(10)]
        stack.enter_context(serving(new_server(address)))
        tokens += [token.token_id for token in stream]
    assert tokens == undisturbed(SETTINGS[0])
    assert told(caplog) == ["waiting for up to 60 s: the base station is shutting down"]


# -- the sample model, with room for a single session --


@pytest.mark.model
def test_generate_says_that_it_waits_and_answers_as_ever() -> None:
    with (
        running_station(str(SAMPLE), "float32", "--kv-memory", "13MiB") as address,
        bench_setup(BUNDLE, address) as place,
    ):
        settings = DraftSettings(Mode.IDS, Sampling(), 1, 4)
        expected = place.answer(place.prompt_ids(OWN_PROMPTS[1]), 16, settings).text
        occupant = place.conversation(settings)
        stream = occupant.begin(place.prompt_ids(" ".join(OWN_PROMPTS))[:STEP]).answer(STEP)
        command = [sys.executable, "-m", "device", "generate", "--bundle", str(BUNDLE), "--server", address]
        with subprocess.Popen(
            [*command, "--prompt", OWN_PROMPTS[1], "--max-new-tokens", "16", "--draft-len", "4"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as device:
            assert device.stderr is not None
            waiting = threading.Thread(target=device.stderr.readline)
            waiting.start()
            while waiting.is_alive():
                next(stream)
                waiting.join(1.0)  # often enough to be busy, and for long enough
            occupant.close()
            text, errors = device.communicate(timeout=60)
    assert device.returncode == 0
    assert (text.removesuffix("\n"), errors) == (expected, "")
