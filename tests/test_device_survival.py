"""Broken connections and restarted base stations, on real sockets: the answer is the undisturbed one."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from basestation.server import Server
from bench.setup.bench_setup import BenchSetup, bench_setup
from device.client import Client, Timeouts
from device.link import Link
from device.session import DraftSettings
from protocol.frames import FrameCodec
from protocol.messages import Mode, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table
from tests.relay import CountingRelay
from tests.sample import BUNDLE, SAMPLE
from tests.serving import serving

BREAKS, RESTARTS = 50, 5
SETTINGS = [
    DraftSettings(Mode.IDS, Sampling(), 32, 4),
    DraftSettings(Mode.COUPLED, Sampling(1.0, seed=5), 32, 4),
    DraftSettings(Mode.TOPK, Sampling(1.0, seed=5), 8, 4),
]
every_mode = pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.mode)


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def disturbed(tokens: Iterator[int], length: int, times: int, disturb: Callable[[], None]) -> list[int]:
    """All tokens, with as many disturbances between them."""
    answer: list[int] = []
    moments = set(range(0, length, length // times))
    assert len(moments) >= times
    for token in tokens:
        if len(answer) in moments:
            disturb()
        answer.append(token)
    return answer


# -- models that are tables --

TARGET = random_table(40, seed=1)
DRAFT = blend(TARGET, random_table(40, seed=2), 0.7)
LENGTH = 400


def tokens_at(address: str, settings: DraftSettings, cleanup: ExitStack) -> Iterator[int]:
    model = FakeDraftModel.make(DRAFT)
    link = Link.connect(address, FrameCodec(len(DRAFT)))
    cleanup.callback(link.close)
    session = Client(link, model.manifest, Timeouts(repeat=0.5)).open(settings, model, [3, 1, 4])
    return (token.token_id for token in session.answer(LENGTH))


def undisturbed(settings: DraftSettings) -> list[int]:
    with serving(Server(FakeTarget.make(TARGET), "tcp://127.0.0.1:0")) as server, ExitStack() as cleanup:
        return list(tokens_at(server.address, settings, cleanup))


@every_mode
def test_fifty_broken_connections_change_nothing(settings: DraftSettings) -> None:
    with ExitStack() as cleanup:
        server = cleanup.enter_context(serving(Server(FakeTarget.make(TARGET), "tcp://127.0.0.1:0")))
        relay = cleanup.enter_context(CountingRelay(port_of(server.address)))
        tokens = tokens_at(f"tcp://127.0.0.1:{relay.port}", settings, cleanup)
        assert disturbed(tokens, LENGTH, BREAKS, relay.hang_up) == undisturbed(settings)


@every_mode
def test_five_restarts_of_the_base_station_change_nothing(settings: DraftSettings) -> None:
    with ExitStack() as cleanup:
        running = cleanup.enter_context(ExitStack())

        def start() -> int:
            return port_of(running.enter_context(serving(Server(FakeTarget.make(TARGET), "tcp://127.0.0.1:0"))).address)

        def restart() -> None:
            """Lead the device to a new base station, without a word of the old one."""
            old = running.pop_all()
            relay.station_port = start()
            relay.hang_up()
            old.close()

        relay = cleanup.enter_context(CountingRelay(start()))
        tokens = tokens_at(f"tcp://127.0.0.1:{relay.port}", settings, cleanup)
        assert disturbed(tokens, LENGTH, RESTARTS, restart) == undisturbed(settings)


# -- the sample model, and processes that are killed --

PROMPT = "Describe how a refrigerator keeps food cold."
NEW_TOKENS = 250


class KilledStation:
    """A base station in a process of its own at one address, killed and started again."""

    def __init__(self, address: str = "tcp://127.0.0.1:0") -> None:
        command = [sys.executable, "-m", "basestation", "serve", "--target", str(SAMPLE), "--dtype", "float32"]
        self.process = subprocess.Popen([*command, "--bind", address], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        serving_line = next(line for line in self.process.stderr if " serving " in line)
        self.address = serving_line.split()[-1]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def restart(self) -> None:
        """Kill it, and start another one that knows nothing."""
        self.kill()
        self.process = KilledStation(self.address).process


@contextmanager
def killed_station() -> Iterator[KilledStation]:
    station = KilledStation()
    try:
        yield station
    finally:
        station.kill()


def real_tokens(place: BenchSetup, settings: DraftSettings, cleanup: ExitStack) -> Iterator[int]:
    conversation = place.conversation(settings)
    cleanup.callback(conversation.close)
    session = conversation.begin(place.prompt_ids(PROMPT))
    return (token.token_id for token in session.answer(NEW_TOKENS))


def expected_of(place: BenchSetup, settings: DraftSettings) -> Sequence[int]:
    return place.answer(place.prompt_ids(PROMPT), NEW_TOKENS, settings).token_ids


@pytest.mark.model
@pytest.mark.endurance
@every_mode
def test_fifty_broken_connections_change_no_answer_of_the_sample_model(
    settings: DraftSettings, station_address: str, place: BenchSetup
) -> None:
    with ExitStack() as cleanup:
        relay = cleanup.enter_context(CountingRelay(port_of(station_address)))
        broken = cleanup.enter_context(bench_setup(BUNDLE, f"tcp://127.0.0.1:{relay.port}"))
        expected = expected_of(place, settings)
        tokens = real_tokens(broken, settings, cleanup)
        assert disturbed(tokens, len(expected), BREAKS, relay.hang_up) == expected


@pytest.mark.model
@pytest.mark.endurance
@every_mode
def test_killing_the_base_station_five_times_changes_no_answer_of_the_sample_model(
    settings: DraftSettings, place: BenchSetup
) -> None:
    with ExitStack() as cleanup:
        station = cleanup.enter_context(killed_station())
        left = cleanup.enter_context(bench_setup(BUNDLE, station.address))
        expected = expected_of(place, settings)
        tokens = real_tokens(left, settings, cleanup)
        assert disturbed(tokens, len(expected), RESTARTS, station.restart) == expected
