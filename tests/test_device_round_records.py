"""The records of both ends join one to one on (device, session, round)."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from basestation.devices.key_folder import KeyFolder
from basestation.engine.pass_records import PassRecordFile
from basestation.server import Server
from bench.setup.prompts import OWN_PROMPTS
from bench.setup.station_process import running_station
from common.json_lines import JsonLinesFile
from device.link.curve_keys import CurveKeys, new_key
from device.link.link import Link
from device.session.client import Client
from device.session.round_records import RoundRecordFile
from device.session.session import DeviceSession
from device.settings import DraftSettings, Timeouts
from protocol.errors import SettingsError
from protocol.frames import FrameCodec
from protocol.messages import Mode, Sampling
from tests.fakes import DRAFT, PROMPT, TARGET, FakeDraftModel, FakeTarget
from tests.link_pair import open_session
from tests.record_file import lines_of
from tests.relay import CountingRelay, port_of
from tests.sample import BUNDLE, PROJECT, SAMPLE
from tests.serving import ANY_PORT, serving

SHARED = ("device", "session", "round", "mode", "drafted", "accepted", "token_id")
SETTINGS = [
    DraftSettings(Mode.IDS, Sampling(), 4, 4),
    DraftSettings(Mode.IDS, Sampling(), 4, None),
    DraftSettings(Mode.COUPLED, Sampling(1.0, seed=3), 4, 6),
    DraftSettings(Mode.TOPK, Sampling(1.0, seed=3), 4, 4),
    DraftSettings(Mode.TARGET, Sampling(), 4, 4),
]


def by_round(lines: list[dict[str, Any]]) -> dict[tuple[str, int, int], dict[str, Any]]:
    rounds = {(line["device"], line["session"], line["round"]): line for line in lines}
    assert len(rounds) == len(lines)
    return rounds


def joined(device: Path, station: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The records of each round: the device's and the base station's, which agree."""
    device_rounds, station_rounds = by_round(lines_of(device)), by_round(lines_of(station))
    assert device_rounds.keys() == station_rounds.keys()
    pairs = [(device_rounds[key], station_rounds[key]) for key in device_rounds]
    for ours, theirs in pairs:
        assert {name: ours[name] for name in SHARED} == {name: theirs[name] for name in SHARED}
    return pairs


class RecordingSetup:
    """Base stations and devices; the stations share one record file, the devices another."""

    def __init__(self, folder: Path, cleanup: ExitStack) -> None:
        self.device, self.station = folder / "device.jsonl", folder / "station.jsonl"
        self.folder = folder
        self._cleanup = cleanup
        self._records = cleanup.enter_context(closing(RoundRecordFile(self.device)))

    @contextmanager
    def server(self, keys: KeyFolder | None = None) -> Iterator[str]:
        with closing(PassRecordFile(self.station)) as records:
            target = FakeTarget.make(TARGET)
            with serving(Server(target, ANY_PORT, keys=keys, records=records)) as server:
                yield server.address

    def client(self, address: str, keys: CurveKeys | None = None) -> tuple[Client, Link]:
        link = Link.connect(address, FrameCodec(len(TARGET)), keys)
        self._cleanup.callback(link.close)
        manifest = FakeDraftModel.make(DRAFT).manifest
        return Client(link, manifest, Timeouts(resend=0.5), records=self._records), link

    def open(self, client: Client, settings: DraftSettings) -> DeviceSession:
        return open_session(client, settings, FakeDraftModel.make(DRAFT), PROMPT)


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[RecordingSetup]:
    with ExitStack() as cleanup:
        yield RecordingSetup(tmp_path, cleanup)


def test_records_of_several_devices_join_with_the_base_stations(setup: RecordingSetup) -> None:
    tokens = rounds = 0
    with setup.server() as address:
        clients = [setup.client(address)[0] for _ in range(3)]
        for settings in SETTINGS:
            sessions = [setup.open(client, settings) for client in clients]
            for session in sessions:
                tokens += len(list(session.answer(30)))
                rounds += session.counters.rounds
                session.close()
    pairs = joined(setup.device, setup.station)
    assert len(pairs) == rounds
    assert sum(ours["accepted"] + 1 for ours, _ in pairs) == tokens == 3 * 30 * len(SETTINGS)
    assert len({ours["device"] for ours, _ in pairs}) == 3
    assert {ours["mode"] for ours, _ in pairs} == {"ids", "coupled", "topk", "target"}
    assert all(ours["drafted"] <= ours["draft_len"] for ours, _ in pairs)


def test_bytes_of_the_rounds_add_up_to_the_links(setup: RecordingSetup) -> None:
    with setup.server() as address:
        client, link = setup.client(address)
        for settings in (SETTINGS[0], SETTINGS[3], SETTINGS[4]):
            session = setup.open(client, settings)
            before = link.uplink_bytes, link.downlink_bytes
            lines_before = len(lines_of(setup.device))
            list(session.answer(30))
            lines = lines_of(setup.device)[lines_before:]
            assert sum(line["uplink_bytes"] for line in lines) == link.uplink_bytes - before[0]
            assert sum(line["downlink_bytes"] for line in lines) == link.downlink_bytes - before[1]


def test_device_with_a_key_is_recorded_under_it_at_both_ends(setup: RecordingSetup) -> None:
    folder = KeyFolder.create(setup.folder / "keys")
    with setup.server(folder) as address:
        for name in ("kitchen", "hall"):
            folder.enroll(name, new_key(setup.folder / name))
            keys = CurveKeys.read(setup.folder / name, folder.public_key)
            list(setup.open(setup.client(address, keys)[0], SETTINGS[0]).answer(20))
    enrolled = {device.public_key for device in folder.devices()}
    assert {ours["device"] for ours, _ in joined(setup.device, setup.station)} == enrolled


def test_rounds_join_across_dropped_connections_and_a_restart(setup: RecordingSetup) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        relay = stack.enter_context(CountingRelay(port_of(first.enter_context(setup.server()))))
        session = setup.open(setup.client(f"tcp://127.0.0.1:{relay.port}")[0], SETTINGS[0])
        stream = session.answer(60)
        for _ in range(20):
            next(stream)
        relay.drop_connections()
        for _ in range(20):
            next(stream)
        relay.station_port = port_of(stack.enter_context(setup.server()))
        relay.drop_connections()
        first.close()
        list(stream)
    pairs = joined(setup.device, setup.station)
    assert len(pairs) == session.counters.rounds
    assert len({ours["session"] for ours, _ in pairs}) == 2


def test_a_record_file_that_cannot_be_made_is_a_wrong_option(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"record is .*missing.*; allowed: a file that can be written"):
        JsonLinesFile(tmp_path / "missing" / "rounds.jsonl")


def test_write_error_stops_recording_but_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with closing(JsonLinesFile(Path("/dev/full"))) as records:
        for _ in range(3):
            records.append([{"round": 1}])
    assert [message.partition(":")[0] for message in caplog.messages] == ["recording stopped"]


# -- the sample model, as processes --


def example_command() -> list[str]:
    """The program in the operations manual that joins both record files."""
    manual = (PROJECT / "docs" / "operations.md").read_text(encoding="utf-8")
    start = "python3 - device.jsonl station.jsonl << 'END'\n"
    return [sys.executable, "-c", manual.partition(start)[2].partition("\nEND\n")[0]]


@pytest.mark.model
def test_records_of_both_commands_join_by_the_manuals_example(tmp_path: Path) -> None:
    station, device = tmp_path / "station.jsonl", tmp_path / "device.jsonl"
    with running_station(str(SAMPLE), "float32", "--record", str(station)) as address:
        program = [sys.executable, "-m", "device"]
        common = ["--bundle", str(BUNDLE), "--server", address, "--record", str(device), "--max-new-tokens", "12"]
        generate = [*program, "generate", *common, "--prompt", OWN_PROMPTS[0], "--json"]
        answer = json.loads(subprocess.run(generate, capture_output=True, check=True).stdout)
        assert len(lines_of(device)) == answer["rounds"]
        typed = f"{OWN_PROMPTS[1]}\n{OWN_PROMPTS[2]}\n\n"
        subprocess.run([*program, "chat", *common, "--temperature", "0.8"], input=typed, text=True, check=True)
    pairs = joined(device, station)
    assert len({ours["device"] for ours, _ in pairs}) == 2
    assert min(ours["draft_seconds"] for ours, _ in pairs if ours["drafted"]) > 0
    command = [*example_command(), str(device), str(station)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.startswith(f"{len(pairs)} rounds: drafting ")
