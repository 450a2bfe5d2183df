"""Dropped connections and restarts of the base station, over real sockets, do not change the answer."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from basestation.server import Server
from bench.setup.bench_setup import BenchSetup, bench_setup
from device.link.link import Link
from device.session.client import Client
from device.settings import DraftSettings, Timeouts
from protocol.frames import FrameCodec
from protocol.messages import Mode, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table
from tests.link_pair import open_session
from tests.relay import CountingRelay, port_of
from tests.sample import BUNDLE, SAMPLE
from tests.serving import ANY_PORT, serving

DROPS, RESTARTS = 50, 5
SETTINGS = [
    DraftSettings(Mode.IDS, Sampling(), 32, 4),
    DraftSettings(Mode.COUPLED, Sampling(1.0, seed=5), 32, 4),
    DraftSettings(Mode.TOPK, Sampling(1.0, seed=5), 8, 4),
]
every_mode = pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.mode)


def interrupted(tokens: Iterator[int], length: int, times: int, interrupt: Callable[[], None]) -> list[int]:
    """Collect an answer of ``length`` tokens; call ``interrupt`` at least ``times`` times, at even distances."""
    answer: list[int] = []
    positions = set(range(0, length, length // times))
    assert len(positions) >= times
    for token in tokens:
        if len(answer) in positions:
            interrupt()
        answer.append(token)
    return answer


# -- models without weights --

TARGET = random_table(40, seed=1)
DRAFT = blend(TARGET, random_table(40, seed=2), 0.7)
MAX_NEW_TOKENS = 400


def tokens_at(address: str, settings: DraftSettings, cleanup: ExitStack) -> Iterator[int]:
    model = FakeDraftModel.make(DRAFT)
    link = Link.connect(address, FrameCodec(len(DRAFT)))
    cleanup.callback(link.close)
    session = open_session(Client(link, model.manifest, Timeouts(resend=0.5)), settings, model, [3, 1, 4])
    return (token.token_id for token in session.answer(MAX_NEW_TOKENS))


def uninterrupted(settings: DraftSettings) -> list[int]:
    with serving(Server(FakeTarget.make(TARGET), ANY_PORT)) as server, ExitStack() as cleanup:
        return list(tokens_at(server.address, settings, cleanup))


@every_mode
def test_fifty_dropped_connections_do_not_change_the_answer(settings: DraftSettings) -> None:
    with ExitStack() as cleanup:
        server = cleanup.enter_context(serving(Server(FakeTarget.make(TARGET), ANY_PORT)))
        relay = cleanup.enter_context(CountingRelay(port_of(server.address)))
        tokens = tokens_at(f"tcp://127.0.0.1:{relay.port}", settings, cleanup)
        assert interrupted(tokens, MAX_NEW_TOKENS, DROPS, relay.drop_connections) == uninterrupted(settings)


@every_mode
def test_five_restarts_of_the_base_station_do_not_change_the_answer(settings: DraftSettings) -> None:
    with ExitStack() as cleanup:
        running = cleanup.enter_context(ExitStack())

        def start() -> int:
            return port_of(running.enter_context(serving(Server(FakeTarget.make(TARGET), ANY_PORT))).address)

        def restart() -> None:
            """Connect the device to a new base station; the old one sends it no Fault."""
            old = running.pop_all()
            relay.station_port = start()
            relay.drop_connections()
            old.close()

        relay = cleanup.enter_context(CountingRelay(start()))
        tokens = tokens_at(f"tcp://127.0.0.1:{relay.port}", settings, cleanup)
        assert interrupted(tokens, MAX_NEW_TOKENS, RESTARTS, restart) == uninterrupted(settings)


# -- the sample model, and processes that are killed --

PROMPT = "Describe how a refrigerator keeps food cold."
SAMPLE_NEW_TOKENS = 250


class KilledStation:
    """A base station process that can be killed and restarted at the same address."""

    def __init__(self, address: str = ANY_PORT) -> None:
        command = [sys.executable, "-m", "basestation", "serve", "--target", str(SAMPLE), "--dtype", "float32"]
        self.process = subprocess.Popen([*command, "--bind", address], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        serving_line = next(line for line in self.process.stderr if " serving " in line)
        self.address = serving_line.split()[-1]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def restart(self) -> None:
        """Kill the process, and start another one without sessions."""
        self.kill()
        self.process = KilledStation(self.address).process


@contextmanager
def killed_station() -> Iterator[KilledStation]:
    station = KilledStation()
    try:
        yield station
    finally:
        station.kill()


def sample_tokens(setup: BenchSetup, settings: DraftSettings, cleanup: ExitStack) -> Iterator[int]:
    conversation = setup.conversation(settings)
    cleanup.callback(conversation.close)
    session = conversation.begin(setup.prompt_ids(PROMPT))
    return (token.token_id for token in session.answer(SAMPLE_NEW_TOKENS))


def expected_of(setup: BenchSetup, settings: DraftSettings) -> Sequence[int]:
    return setup.answer(setup.prompt_ids(PROMPT), SAMPLE_NEW_TOKENS, settings).token_ids


@pytest.mark.model
@pytest.mark.endurance
@every_mode
def test_fifty_dropped_connections_do_not_change_the_sample_models_answer(
    settings: DraftSettings, station_address: str, sample_setup: BenchSetup
) -> None:
    with ExitStack() as cleanup:
        relay = cleanup.enter_context(CountingRelay(port_of(station_address)))
        relayed_setup = cleanup.enter_context(bench_setup(BUNDLE, f"tcp://127.0.0.1:{relay.port}"))
        expected = expected_of(sample_setup, settings)
        tokens = sample_tokens(relayed_setup, settings, cleanup)
        assert interrupted(tokens, len(expected), DROPS, relay.drop_connections) == expected


@pytest.mark.model
@pytest.mark.endurance
@every_mode
def test_killing_the_base_station_five_times_does_not_change_the_sample_models_answer(
    settings: DraftSettings, sample_setup: BenchSetup
) -> None:
    with ExitStack() as cleanup:
        station = cleanup.enter_context(killed_station())
        killed_setup = cleanup.enter_context(bench_setup(BUNDLE, station.address))
        expected = expected_of(sample_setup, settings)
        tokens = sample_tokens(killed_setup, settings, cleanup)
        assert interrupted(tokens, len(expected), RESTARTS, station.restart) == expected
