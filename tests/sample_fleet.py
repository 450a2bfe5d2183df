"""The sample model served with keys and metrics, and the service of one enrolled device, each a process."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from basestation.devices.key_folder import KeyFolder
from bench.setup.station_process import StationProcess, station_process
from device.link.curve_keys import CurveKeys, new_key
from device.link.link import Link
from protocol.bundle import Manifest
from protocol.frames import FrameCodec
from protocol.messages import Decode
from tests.device_service import DeviceService, device_service
from tests.sample import BUNDLE, SAMPLE


@dataclass(frozen=True)
class SampleFleet:
    """A base station, and the service of its device ``kitchen``; ``garden`` is enrolled and silent."""

    path: Path
    folder: KeyFolder
    station: StationProcess
    kitchen: DeviceService

    def ask(self, prompt: str = "Name three rivers.", **fields: object) -> int:
        """Ask the kitchen; returns the status."""
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 12, "temperature": 0} | fields
        request = urllib.request.Request(  # noqa: S310 - the test's own server
            f"{self.kitchen.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 - as above
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def fault(self) -> None:
        """Send a request that the base station answers with a Fault."""
        keys = CurveKeys.read(self.path / "kitchen", self.folder.public_key)
        link = Link.connect(self.station.address, FrameCodec(Manifest.read(BUNDLE).vocab_size), keys)
        link.send(Decode(0, 1, 1))
        while link.receive(1) is None:
            pass
        link.close()


@contextmanager
def sample_fleet(path: Path) -> Iterator[SampleFleet]:
    folder = KeyFolder.create(path / "keys")
    for name in ("kitchen", "garden"):
        folder.enroll(name, new_key(path / name))
    keys = ["--key", str(path / "kitchen"), "--station-key", str(folder.public_path)]
    with (
        station_process(str(SAMPLE), "float32", ["--keys", str(path / "keys")]) as station,
        device_service(station.address, *keys) as kitchen,
    ):
        yield SampleFleet(path, folder, station, kitchen)
