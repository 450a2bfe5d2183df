"""The device backs off where the base station is full or shutting down; the answer does not change."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import cast

import pytest

from basestation.devices.rate_limit import RateLimiter
from basestation.kv_cache.kv_pool import PAGE_SIZE
from basestation.server import Server
from bench.setup.bench_setup import bench_setup
from bench.setup.prompts import OWN_PROMPTS
from bench.setup.station_process import running_station
from device.link.link import Link
from device.planning.planners import Planners
from device.planning.trials import TRIAL
from device.session.client import Client
from device.session.session import DeviceSession
from device.settings import DraftSettings, Timeouts
from protocol.errors import ClosingError, FaultError, FullError, LimitError
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import Decode, Draft, Fault, Hello, Message, Mode, Open, Sampling
from tests.fakes import DRAFT, PROMPT, TARGET, FakeDraftModel, FakeTarget
from tests.invariants import MAX_NEW_TOKENS, token_ids_of
from tests.link_pair import MemoryTransport, RefusingTransport, Station, TimedTransport, join, open_session
from tests.sample import BUNDLE, SAMPLE
from tests.serving import ANY_PORT, serving

LONG_PROMPT = PROMPT * (2 * PAGE_SIZE // len(PROMPT) + 1)
SETTINGS = [
    DraftSettings(mode, sampling, uplink_k=4, draft_len=4)
    for mode in Mode
    for sampling in (Sampling(), Sampling(1.0, seed=3))
    if mode is not Mode.IDS or sampling.greedy
]
PLANNED = DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=None)
every_mode = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.mode}-{s.sampling.temperature:g}")


def new_station() -> Station:
    return Station(FakeTarget.make(TARGET, capacity=3 * PAGE_SIZE))


def open_over(transport: MemoryTransport, settings: DraftSettings, prompt: list[int] = PROMPT) -> DeviceSession:
    model = FakeDraftModel.make(DRAFT)
    return open_session(join(transport.station, model, transport)[0], settings, model, prompt)


def uninterrupted(settings: DraftSettings) -> list[int]:
    return token_ids_of(open_over(MemoryTransport(new_station()), settings))


def occupy(station: Station) -> DeviceSession:
    """Open another device's session, which fills the KV pool until it counts as idle."""
    return open_over(MemoryTransport(station, peer=b"b"), SETTINGS[0], LONG_PROMPT)


def device_log(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("device")]


def pauses_of(transport: RefusingTransport) -> list[float]:
    """Seconds between attempts to open a session."""
    times = [*transport.refused_at, transport.now]
    return [later - earlier for earlier, later in pairwise(times)]


@every_mode
def test_refused_device_connects_when_memory_is_free(settings: DraftSettings, caplog: pytest.LogCaptureFixture) -> None:
    expected = uninterrupted(settings)
    station = new_station()
    occupy(station)
    transport = TimedTransport(station)
    assert token_ids_of(open_over(transport, settings)) == expected
    assert 5 <= transport.now < 12
    (line,) = device_log(caplog)
    assert line.startswith("waiting for up to 60 s: the base station is full (busy sessions: 1); retry in ")


@every_mode
def test_refused_round_is_sent_again(settings: DraftSettings) -> None:
    expected = uninterrupted(settings)
    station = new_station()
    target = cast(FakeTarget, station.engine._target)
    transport = TimedTransport(station)
    stream = open_over(transport, settings).answer(MAX_NEW_TOKENS)
    tokens = [next(stream).token_id for _ in range(MAX_NEW_TOKENS // 2)]
    target.memory = 0

    def free_memory_after_7_seconds(_: Message) -> int:
        target.memory = 0 if transport.now < 7 else None
        return 1

    transport.up = free_memory_after_7_seconds
    tokens += [token.token_id for token in stream]
    assert tokens == expected
    assert transport.now > 7


@pytest.mark.parametrize("code", [FullError.code, ClosingError.code])
def test_pauses_grow_up_to_the_resend_timeout(code: str) -> None:
    transport = RefusingTransport(new_station())
    transport.code, transport.opens_at = code, 30.0
    assert token_ids_of(open_over(transport, SETTINGS[0])) == uninterrupted(SETTINGS[0])
    pauses = pauses_of(transport)
    assert len(pauses) > 4
    assert 1 <= pauses[0] <= 1.25
    assert all(later >= earlier / 1.25 for earlier, later in pairwise(pauses))
    assert max(pauses) <= Timeouts().resend * 1.25
    assert pauses[-1] >= Timeouts().resend


def test_pauses_last_as_long_as_the_fault_says() -> None:
    transport = RefusingTransport(new_station())
    transport.opens_at, transport.retry_seconds = 20.0, 9
    token_ids_of(open_over(transport, SETTINGS[0]))
    pauses = pauses_of(transport)
    assert len(pauses) >= 2
    assert all(9 <= pause <= 9 * 1.25 for pause in pauses)


@pytest.mark.parametrize("code", [FullError.code, ClosingError.code])
@pytest.mark.parametrize("retry_seconds", [0, 7])
def test_retry_timeout_raises_the_last_fault(code: str, retry_seconds: int) -> None:
    transport = RefusingTransport(new_station())
    transport.code, transport.opens_at, transport.retry_seconds = code, 1e9, retry_seconds
    with pytest.raises(FaultError, match=r"no room \(waited \d\d s\)") as caught:
        open_over(transport, SETTINGS[0])
    assert caught.value.fault_code == code
    assert caught.value.retry_seconds == (retry_seconds or Timeouts().resend)
    assert Timeouts().retry - 10 < transport.now <= Timeouts().retry


def test_pause_longer_than_the_retry_timeout_raises_at_once() -> None:
    transport = RefusingTransport(new_station())
    transport.opens_at, transport.retry_seconds = 1e9, 3600
    with pytest.raises(FaultError, match=r"no room \(waited 0 s\)") as caught:
        open_over(transport, SETTINGS[0])
    assert caught.value.retry_seconds == 3600
    assert transport.now == 0


def test_round_trip_estimate_excludes_back_off() -> None:
    transport = RefusingTransport(new_station())
    transport.opens_at = 30.0
    model = FakeDraftModel.make(DRAFT)
    client, _ = join(transport.station, model, transport)
    planners = Planners(model.manifest.quality)
    stream = open_session(client, PLANNED, model, PROMPT, planners).answer(TRIAL)
    assert len(list(stream)) == TRIAL
    assert transport.now >= 30
    assert planners.for_settings(PLANNED, client.welcome).times.round_trip_seconds < 1e-6


class RestartingTransport(RefusingTransport):
    """A base station that shuts down after the first round, and takes 30 s to restart."""

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


def test_round_time_estimate_excludes_a_restart() -> None:
    transport = RestartingTransport(new_station())
    model = FakeDraftModel.make(DRAFT)
    client, _ = join(transport.station, model, transport)
    planners = Planners(model.manifest.quality)
    assert len(token_ids_of(open_session(client, PLANNED, model, PROMPT, planners))) == MAX_NEW_TOKENS
    assert transport.now >= 31
    assert planners.for_settings(PLANNED, client.welcome).times.seconds(8) < 1e-6


class SessionDroppingTransport(TimedTransport):
    """A base station that opens every session and drops it at once."""

    opened = 0

    def send(self, frame: bytes) -> None:
        message = self.station.codec.decode(frame)
        self.opened += isinstance(message, Open)
        if isinstance(message, Draft | Decode):
            self.station.outboxes[self.peer].append(Fault(message.session_id, "unknown_session", "not open"))
        else:
            super().send(frame)


def test_retry_timeout_applies_where_every_session_is_unknown() -> None:
    transport = SessionDroppingTransport(Station(FakeTarget.make(TARGET)))
    session = open_over(transport, SETTINGS[0])
    with pytest.raises(FaultError, match=r"not open \(waited \d\d s\)"):
        token_ids_of(session)
    assert Timeouts().retry - 10 < transport.now <= Timeouts().retry
    assert transport.opened < 25


class RoundRefusingTransport(RefusingTransport):
    """A base station that refuses a round, then every session."""

    def send(self, frame: bytes) -> None:
        message = self.station.codec.decode(frame)
        if isinstance(message, Draft | Decode) and self.now < 50:
            self.opens_at = 1e9
            self.now += 30
            self.station.outboxes[self.peer].append(Fault(message.session_id, FullError.code, "no memory", 40))
        else:
            super().send(frame)


def test_retry_timeout_starts_at_the_first_refusal_of_any_request() -> None:
    transport = RoundRefusingTransport(new_station())
    session = open_over(transport, SETTINGS[0])
    with pytest.raises(FaultError, match="no room"):
        token_ids_of(session)
    assert transport.now <= 30 + Timeouts().retry


class ReconnectingTransport(RefusingTransport):
    """Reconnects three seconds into the first pause, to a base station that has memory."""

    def receive(self, timeout: float) -> bytes | None:
        if not self.refused_at or self.now < 3 or self.connections > 1:
            return super().receive(timeout)
        self.connections = 2
        self.opens_at = self.now
        return None


def test_new_connection_ends_the_pause() -> None:
    transport = ReconnectingTransport(new_station())
    transport.opens_at, transport.retry_seconds = 1e9, 40
    assert token_ids_of(open_over(transport, SETTINGS[0])) == uninterrupted(SETTINGS[0])
    assert transport.now == 3


@every_mode
def test_answer_continues_at_the_replacement_of_a_stopped_base_station(settings: DraftSettings) -> None:
    expected = uninterrupted(settings)
    transport = TimedTransport(new_station())
    session = open_over(transport, settings)
    stream = session.answer(MAX_NEW_TOKENS)
    tokens = [next(stream).token_id for _ in range(MAX_NEW_TOKENS // 2)]
    stopped = transport.station
    stopped.engine.close()

    def replace_after_20_seconds(_: Message) -> int:
        if transport.now > 20 and transport.station is stopped:
            transport.station = new_station()
        return int(transport.station is not stopped)

    transport.up = replace_after_20_seconds
    tokens += [token.token_id for token in stream]
    assert tokens == expected
    assert transport.now > 20


class RateLimitedTransport(TimedTransport):
    """A base station that drops what exceeds a rate, and tells so at most once a second.

    Attributes:
        dropped: messages.
        opened: sessions.
    """

    def __init__(self, station: Station, per_second: int) -> None:
        super().__init__(station)
        self.limiter = RateLimiter(per_second, clock=lambda: self.now)
        self.dropped = self.opened = 0

    def send(self, frame: bytes) -> None:
        if self.limiter.allows("a"):
            self.opened += isinstance(self.station.codec.decode(frame), Open)
            super().send(frame)
            return
        self.dropped += 1
        if self.limiter.should_notify("a"):
            self.station.outboxes[self.peer].append(Fault(None, LimitError.code, "too many requests", 2))


@pytest.mark.parametrize("drafts_ahead", [0, 3])
@pytest.mark.parametrize("per_second", [1, 5])
def test_requests_beyond_a_rate_limit_are_repeated_when_it_allows_them(per_second: int, drafts_ahead: int) -> None:
    transport = RateLimitedTransport(Station(FakeTarget.make(TARGET)), per_second)
    model, timeouts = FakeDraftModel.make(DRAFT), Timeouts(resend=1000, retry=2000)
    client, _ = join(transport.station, model, transport, timeouts)
    settings = replace(SETTINGS[0], draft_len=1, drafts_ahead=drafts_ahead)
    assert token_ids_of(open_session(client, settings, model, PROMPT)) == uninterrupted(SETTINGS[0])
    assert transport.dropped > 0
    assert transport.opened == 1
    assert transport.now < timeouts.resend


# -- over a real socket --


@contextmanager
def client_at(address: str, timeouts: Timeouts) -> Iterator[Client]:
    link = Link.connect(address, FrameCodec(len(DRAFT)))
    try:
        yield Client(link, FakeDraftModel.make(DRAFT).manifest, timeouts)
    finally:
        link.close()


def new_server(bind: str = ANY_PORT, limits: Limits | None = None) -> Server:
    return Server(FakeTarget.make(TARGET, capacity=3 * PAGE_SIZE), bind, limits)


def test_refused_device_connects_when_another_leaves_over_a_socket(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving(new_server()))
        first, second = (stack.enter_context(client_at(server.address, Timeouts())) for _ in range(2))
        occupant = open_session(first, SETTINGS[0], FakeDraftModel.make(DRAFT), LONG_PROMPT)
        threading.Timer(0.5, occupant.close).start()
        session = open_session(second, SETTINGS[0], FakeDraftModel.make(DRAFT), PROMPT)
        assert token_ids_of(session) == uninterrupted(SETTINGS[0])
    assert len(device_log(caplog)) == 1


def test_answer_continues_after_a_restart_over_a_socket(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        with serving(new_server()) as stopped:
            address = stopped.address
            client = stack.enter_context(client_at(address, Timeouts()))
            stream = open_session(client, SETTINGS[0], FakeDraftModel.make(DRAFT), PROMPT).answer(MAX_NEW_TOKENS)
            tokens = [next(stream).token_id for _ in range(10)]
        stack.enter_context(serving(new_server(address)))
        tokens += [token.token_id for token in stream]
    assert tokens == uninterrupted(SETTINGS[0])
    assert device_log(caplog) == ["waiting for up to 60 s: the base station is shutting down"]


def test_an_answer_over_a_socket_waits_for_the_rate_limit() -> None:
    settings, timeouts = replace(SETTINGS[0], draft_len=1), Timeouts(resend=1000, retry=20)
    with (
        serving(new_server(limits=Limits(max_requests_per_second=5))) as server,
        client_at(server.address, timeouts) as client,
    ):
        session = open_session(client, settings, FakeDraftModel.make(DRAFT), PROMPT)
        assert token_ids_of(session) == uninterrupted(SETTINGS[0])


def test_a_message_that_no_rate_limit_ever_allows_is_an_error() -> None:
    with (
        serving(new_server(limits=Limits(max_bytes_per_second=50))) as server,
        client_at(server.address, Timeouts(retry=5)) as client,
        pytest.raises(FaultError, match="--max-bytes-per-second of 50"),
    ):
        open_session(client, SETTINGS[0], FakeDraftModel.make(DRAFT), LONG_PROMPT)


# -- the sample model, with memory for a single session --


@pytest.mark.model
def test_generate_logs_the_wait_and_prints_the_same_answer() -> None:
    with (
        running_station(str(SAMPLE), "float32", "--kv-memory", "13MiB") as address,
        bench_setup(BUNDLE, address) as setup,
    ):
        settings = DraftSettings(Mode.IDS, Sampling(), 1, 4)
        expected = setup.answer(setup.prompt_ids(OWN_PROMPTS[1]), 16, settings).text
        occupant = setup.conversation(settings)
        stream = occupant.begin(setup.prompt_ids(" ".join(OWN_PROMPTS))[:PAGE_SIZE]).answer(PAGE_SIZE)
        command = [sys.executable, "-m", "device", "generate", "--bundle", str(BUNDLE), "--server", address]
        with subprocess.Popen(
            [*command, "--prompt", OWN_PROMPTS[1], "--max-new-tokens", "16", "--draft-len", "4"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as device:
            assert device.stderr is not None
            first_log_line = threading.Thread(target=device.stderr.readline)
            first_log_line.start()
            while first_log_line.is_alive():
                next(stream)
                first_log_line.join(1.0)  # the session stays busy, and has tokens left until the device waits
            occupant.close()
            text, errors = device.communicate(timeout=60)
    assert device.returncode == 0
    assert (text.removesuffix("\n"), errors) == (expected, "")
