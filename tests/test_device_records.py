"""The records of both ends: on (device, session, round) they join with nothing left over."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from basestation.key_folder import KeyFolder
from basestation.pass_records import PassRecordFile
from basestation.server import Server
from bench.setup.prompts import OWN_PROMPTS
from bench.setup.station_process import running_station
from common.json_lines import JsonLinesFile
from device.client import Client, Timeouts
from device.curve_keys import LinkKeys, new_key
from device.link import Link
from device.round_records import RoundRecordFile
from device.session import DeviceSession, DraftSettings
from protocol.frames import FrameCodec
from protocol.messages import Mode, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table
from tests.relay import CountingRelay
from tests.sample import BUNDLE, PROJECT, SAMPLE
from tests.serving import serving

TARGET = random_table(20, seed=1)
DRAFT = blend(TARGET, random_table(20, seed=2), 0.7)
PROMPT = [3, 1, 4, 1, 5]
SHARED = ("device", "session", "round", "mode", "drafted", "accepted", "token_id")
SETTINGS = [
    DraftSettings(Mode.IDS, Sampling(), 4, 4),
    DraftSettings(Mode.IDS, Sampling(), 4, None),
    DraftSettings(Mode.COUPLED, Sampling(1.0, seed=3), 4, 6),
    DraftSettings(Mode.TOPK, Sampling(1.0, seed=3), 4, 4),
    DraftSettings(Mode.TARGET, Sampling(), 4, 4),
]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_round(lines: list[dict[str, Any]]) -> dict[tuple[str, int, int], dict[str, Any]]:
    named = {(line["device"], line["session"], line["round"]): line for line in lines}
    assert len(named) == len(lines)
    return named


def joined(device: Path, station: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Both ends' lines of every round; each has one of the other's."""
    ours, theirs = by_round(lines_of(device)), by_round(lines_of(station))
    assert ours.keys() == theirs.keys()
    pairs = [(ours[key], theirs[key]) for key in ours]
    for one, other in pairs:
        assert {name: one[name] for name in SHARED} == {name: other[name] for name in SHARED}
    return pairs


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


class Place:
    """Base stations and devices that write down their rounds, each kind into one file."""

    def __init__(self, folder: Path, cleanup: ExitStack) -> None:
        self.device, self.station = folder / "device.jsonl", folder / "station.jsonl"
        self.folder = folder
        self._cleanup = cleanup
        self._records = cleanup.enter_context(closing(RoundRecordFile(self.device)))

    @contextmanager
    def server(self, keys: KeyFolder | None = None) -> Iterator[str]:
        with closing(PassRecordFile(self.station)) as records:
            target = FakeTarget.make(TARGET)
            with serving(Server(target, "tcp://127.0.0.1:0", keys=keys, records=records)) as server:
                yield server.address

    def client(self, address: str, keys: LinkKeys | None = None) -> tuple[Client, Link]:
        link = Link.connect(address, FrameCodec(len(TARGET)), keys)
        self._cleanup.callback(link.close)
        manifest = FakeDraftModel.make(DRAFT).manifest
        return Client(link, manifest, Timeouts(repeat=0.5), records=self._records), link

    def open(self, client: Client, settings: DraftSettings) -> DeviceSession:
        return client.open(settings, FakeDraftModel.make(DRAFT), PROMPT)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as cleanup:
        yield Place(tmp_path, cleanup)


def test_the_records_of_many_devices_join_with_the_base_stations(place: Place) -> None:
    tokens = rounds = 0
    with place.server() as address:
        clients = [place.client(address)[0] for _ in range(3)]
        for settings in SETTINGS:
            sessions = [place.open(client, settings) for client in clients]
            for session in sessions:
                tokens += len(list(session.answer(30)))
                rounds += session.counters.rounds
                session.close()
    pairs = joined(place.device, place.station)
    assert len(pairs) == rounds
    assert sum(one["accepted"] + 1 for one, _ in pairs) == tokens == 3 * 30 * len(SETTINGS)
    assert len({one["device"] for one, _ in pairs}) == 3
    assert {one["mode"] for one, _ in pairs} == {"ids", "coupled", "topk", "target"}
    assert all(one["drafted"] <= one["draft_len"] for one, _ in pairs)


def test_the_bytes_of_the_rounds_are_the_links(place: Place) -> None:
    with place.server() as address:
        client, link = place.client(address)
        for settings in (SETTINGS[0], SETTINGS[3], SETTINGS[4]):
            session = place.open(client, settings)
            before = link.uplink_bytes, link.downlink_bytes
            counted = len(lines_of(place.device))
            list(session.answer(30))
            lines = lines_of(place.device)[counted:]
            assert sum(line["uplink_bytes"] for line in lines) == link.uplink_bytes - before[0]
            assert sum(line["downlink_bytes"] for line in lines) == link.downlink_bytes - before[1]


def test_with_keys_a_device_is_its_key_at_both_ends(place: Place) -> None:
    folder = KeyFolder.create(place.folder / "keys")
    with place.server(folder) as address:
        for name in ("kitchen", "hall"):
            folder.enroll(name, new_key(place.folder / name))
            keys = LinkKeys.read(place.folder / name, folder.public_key)
            list(place.open(place.client(address, keys)[0], SETTINGS[0]).answer(20))
    enrolled = {one.public_key for one in folder.devices()}
    assert {one["device"] for one, _ in joined(place.device, place.station)} == enrolled


def test_rounds_join_over_broken_connections_and_a_second_base_station(place: Place) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        relay = stack.enter_context(CountingRelay(port_of(first.enter_context(place.server()))))
        session = place.open(place.client(f"tcp://127.0.0.1:{relay.port}")[0], SETTINGS[0])
        stream = session.answer(60)
        for _ in range(20):
            next(stream)
        relay.hang_up()
        for _ in range(20):
            next(stream)
        relay.station_port = port_of(stack.enter_context(place.server()))
        relay.hang_up()
        first.close()
        list(stream)
    pairs = joined(place.device, place.station)
    assert len(pairs) == session.counters.rounds
    assert len({one["session"] for one, _ in pairs}) == 2


def test_a_record_that_cannot_be_written_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with closing(JsonLinesFile(Path("/dev/full"))) as records:
        for _ in range(3):
            records.append([{"round": 1}])
    assert [message.partition(":")[0] for message in caplog.messages] == ["no more rounds are recorded"]


# -- the sample model, as processes --


def example() -> list[str]:
    """The program of the operations manual that joins both records."""
    manual = (PROJECT / "docs" / "operations.md").read_text(encoding="utf-8")
    begin = "python3 - device.jsonl station.jsonl << 'END'\n"
    return [sys.executable, "-c", manual.partition(begin)[2].partition("\nEND\n")[0]]


@pytest.mark.model
def test_both_commands_leave_records_that_the_manuals_example_joins(tmp_path: Path) -> None:
    station, device = tmp_path / "station.jsonl", tmp_path / "device.jsonl"
    with running_station(str(SAMPLE), "float32", "--record", str(station)) as address:
        begin = [sys.executable, "-m", "device"]
        common = ["--bundle", str(BUNDLE), "--server", address, "--record", str(device), "--max-new-tokens", "12"]
        generate = [*begin, "generate", *common, "--prompt", OWN_PROMPTS[0], "--json"]
        answer = json.loads(subprocess.run(generate, capture_output=True, check=True).stdout)
        assert len(lines_of(device)) == answer["rounds"]
        said = f"{OWN_PROMPTS[1]}\n{OWN_PROMPTS[2]}\n\n"
        subprocess.run([*begin, "chat", *common, "--temperature", "0.8"], input=said, text=True, check=True)
    pairs = joined(device, station)
    assert len({one["device"] for one, _ in pairs}) == 2
    assert all(one["draft_seconds"] > 0 for one, _ in pairs if one["drafted"])
    shown = subprocess.run([*example(), str(device), str(station)], capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"{len(pairs)} rounds: drafting ")
