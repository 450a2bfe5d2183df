"""What hostile devices do to eight honest ones beside them: nothing, but a bounded delay."""

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zmq

from basestation.devices.key_folder import KeyFolder
from bench.setup.bench_setup import BenchSetup
from bench.setup.prompts import OWN_PROMPTS
from bench.setup.station_process import station_process
from common.key_files import write_pair
from device.link.curve_keys import CurveKeys
from protocol.messages import PROTOCOL_VERSION, Close, Draft, Hello, Message, Mode, Open, Sampling
from tests.attack_process import attacking
from tests.honest_device import HonestDevice
from tests.hostile import ATTACKS, AttackedStation
from tests.hostile_devices import DEVICE_ATTACKS, raise_descriptor_limit
from tests.sample import SAMPLE

DEVICES = 8
MIB = 2**20
KV_MEMORY = 1024 * MIB
PEER_MEMORY = 1024 * MIB
pytestmark = [pytest.mark.model, pytest.mark.endurance]


@dataclass
class Site:
    """A base station in a process of its own, honest devices that know their answers, and keys of an attacker."""

    process: psutil.Process
    records: Path
    devices: Sequence[HonestDevice]
    keys: Sequence[CurveKeys]
    station: AttackedStation
    new_keys: Callable[[str], CurveKeys]

    def run_devices(self, rounds: int) -> list[float]:
        """Let each device verify that many rounds; returns the queueing delays of all, from the records."""
        start = len(self.records.read_text(encoding="utf-8").splitlines())
        threads = [device.start(rounds) for device in self.devices]
        for thread in threads:
            thread.join()
        for device in self.devices:
            if device.failure is not None:
                raise device.failure
        lines = self.records.read_text(encoding="utf-8").splitlines()[start:]
        honest = {key.public for key in self.keys}
        rounds_of = [json.loads(line) for line in lines]
        return [one["queueing_delay"] for one in rounds_of if one["device"] in honest and one["drafted"]]


@contextmanager
def site(setup: BenchSetup, path: Path) -> Iterator[Site]:
    folder = KeyFolder.create(path / "keys")
    records = path / "rounds.jsonl"

    def new_keys(name: str, enroll: bool = True) -> CurveKeys:
        public, secret = zmq.curve_keypair()
        write_pair(path / name, public.decode(), secret.decode())
        if enroll:
            folder.enroll(name, public.decode())
        return CurveKeys.read(path / name, folder.public_key)

    options: list[Any] = ["--keys", str(path / "keys"), "--record", str(records), "--idle-timeout", "10"]
    options += ["--kv-memory", str(KV_MEMORY), "--peer-memory", str(PEER_MEMORY)]
    manifest = setup.model.manifest
    hello = Hello(PROTOCOL_VERSION, manifest.vocab_size, bytes.fromhex(manifest.vocabulary_hash), manifest.stop_ids)
    with station_process(str(SAMPLE), "float32", options) as running, ExitStack() as stack:
        station = AttackedStation(running.address, hello, new_keys("attacker"), new_keys("unknown", enroll=False))
        keys, devices = [new_keys(f"device{index}") for index in range(DEVICES)], []
        for index, key in enumerate(keys):
            dealer = stack.enter_context(station.dealer(key))
            prompt = tuple(setup.prompt_ids(OWN_PROMPTS[index % len(OWN_PROMPTS)]))
            devices.append(HonestDevice(dealer, station.codec, hello, prompt))
            devices[-1].learn_answer(60)
        with station.dealer(new_keys("warm-up")) as dealer:
            run_every_number_of_rows(station, dealer)
        yield Site(psutil.Process(running.pid), records, devices, keys, station, new_keys)


def run_every_number_of_rows(station: AttackedStation, dealer: "zmq.Socket[bytes]") -> None:
    """Run forward passes of all sizes, as a base station does in its first hour: oneDNN keeps kernels for each."""

    def request(message: Message) -> None:
        dealer.send(station.codec.encode(message))
        assert dealer.poll(60_000), "no reply"
        dealer.recv()

    request(station.hello)
    for session, rows in enumerate([*range(1, 16), *range(16, 257, 8)]):
        request(Open(session, 0, Mode.IDS, Sampling(), tuple(range(1, rows + 1))))
        request(Draft(session, 1, tuple(range(1, min(rows, 64) + 1))))
        dealer.send(station.codec.encode(Close(session)))


def settled(measure: Callable[[], int], most: int, seconds: float) -> int:
    """The value of ``measure`` once it is at most ``most``, or after ``seconds``."""
    end = time.monotonic() + seconds
    while (value := measure()) > most and time.monotonic() < end:
        time.sleep(0.5)
    return value


def test_hostile_devices_change_no_answer_and_delay_rounds_by_a_bounded_factor(
    sample_setup: BenchSetup, tmp_path: Path
) -> None:
    with site(sample_setup, tmp_path) as one:
        process = one.process
        one.run_devices(24)
        undisturbed = [delay for _ in range(5) for delay in one.run_devices(24)]
        before, descriptors = process.memory_info().rss, process.num_fds()
        peak = before
        with attacking(one.station, (*ATTACKS, *DEVICE_ATTACKS)) as attacks:
            disturbed: list[float] = []
            while len(disturbed) < 1000 or min(attacks.runs.values()) == 0:
                disturbed += one.run_devices(24)
                peak = max(peak, process.memory_info().rss)
            runs = attacks.runs
        after = settled(lambda: process.memory_info().rss, before + 20 * MIB, seconds=300)
        left = settled(process.num_fds, descriptors, seconds=60)
    was, now = (float(np.quantile(delays, 0.99)) for delays in (undisturbed, disturbed))
    sys.stdout.write(
        f"rounds: {len(undisturbed)} undisturbed, {len(disturbed)} beside attacks {runs}\n"
        f"p99 of the queueing delay: {1000 * was:.0f} ms, beside attacks {1000 * now:.0f} ms ({now / was:.2f} times)\n"
        f"resident: {before / MIB:.0f} MiB, at most {peak / MIB:.0f}, afterwards {after / MIB:.0f}\n"
        f"descriptors: {descriptors}, afterwards {left}\n"
    )
    assert now <= 3 * was
    assert peak <= before + KV_MEMORY + PEER_MEMORY
    assert after <= before + 20 * MIB
    assert left <= descriptors


def test_2000_idle_connections_for_a_minute_stop_nobody(sample_setup: BenchSetup, tmp_path: Path) -> None:
    raise_descriptor_limit()
    with site(sample_setup, tmp_path) as one, ExitStack() as stack:
        threads = [device.start(20) for device in one.devices]
        idle = [one.station.tcp() for _ in range(2000)]
        dealer = stack.enter_context(one.station.dealer(one.new_keys("newcomer")))
        newcomer = HonestDevice(dealer, one.station.codec, one.station.hello, (1, 2, 3))
        end = time.monotonic() + 60
        while time.monotonic() < end:
            idle = [connection if is_open(connection) else one.station.tcp() for connection in idle]
            time.sleep(1)
        newcomer.learn_answer(20)
        for thread in threads:
            thread.join()
        for connection in idle:
            connection.close()
    for device in one.devices:
        assert device.failure is None
        assert device.rounds >= 20


def is_open(connection: socket.socket) -> bool:
    """Whether the base station has not closed a connection; a closed one is closed here too."""
    connection.setblocking(False)
    try:
        while connection.recv(1000):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    connection.close()
    return False
