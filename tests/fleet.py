"""A base station with keys and a monitor, over a target without weights, and devices enrolled by name."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from basestation.devices.key_folder import KeyFolder
from basestation.monitoring.metrics import Metrics
from basestation.monitoring.monitor import Monitor
from basestation.monitoring.snapshot import Snapshot
from basestation.server import Server
from device.link.curve_keys import CurveKeys, new_key
from device.link.link import Link
from device.session.client import Client
from device.session.session import DeviceSession
from device.settings import Timeouts
from protocol.frames import FrameCodec
from tests.fakes import DRAFT, PROMPT, TARGET, VOCAB, FakeDraftModel, FakeTarget
from tests.link_pair import IDS, open_session
from tests.serving import ANY_PORT, serving


@dataclass(frozen=True)
class Response:
    """Status, headers and text of an answer."""

    status: int
    headers: Mapping[str, str]
    text: str


def get(url: str, host: str | None = None) -> Response:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})  # noqa: S310 - the test's own server
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - as above
            return Response(answer.status, dict(answer.headers), answer.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return Response(error.code, dict(error.headers), error.read().decode())


@dataclass
class Fleet:
    path: Path
    folder: KeyFolder
    metrics: Metrics
    monitor: Monitor
    server: Server
    links: dict[str, Link] = field(default_factory=dict)
    cleanup: ExitStack = field(default_factory=ExitStack)

    def enroll(self, name: str, shown: str | None = None) -> None:
        """Enroll a device; ``shown`` is the name that the operator wrote into the folder by hand."""
        key = new_key(self.path / name)
        self.folder.enroll(name, key)
        if shown is not None:
            (file,) = [path for path in (self.path / "keys" / "devices").iterdir() if path.read_text() == f"{name}\n"]
            file.write_text(shown)

    def session(self, name: str) -> DeviceSession:
        """A session of an enrolled device."""
        model = FakeDraftModel.make(DRAFT)
        keys = CurveKeys.read(self.path / name, self.folder.public_key)
        link = self.links[name] = Link.connect(self.server.address, FrameCodec(VOCAB), keys)
        self.cleanup.callback(link.close)
        return open_session(Client(link, model.manifest, Timeouts(connect=5)), IDS, model, PROMPT)

    def snapshot(self) -> Snapshot:
        return Snapshot.of(self.metrics.registry.collect(), 0.0)

    def report(self, device: str | None = None) -> Any:
        """What the page gets."""
        query = "" if device is None else f"?device={quote(device)}"
        return json.loads(get(f"{self.monitor.url}/fleet.json{query}").text)


@contextmanager
def fleet(path: Path) -> Iterator[Fleet]:
    folder, metrics = KeyFolder.create(path / "keys"), Metrics()
    server = Server(FakeTarget.make(TARGET), ANY_PORT, keys=folder, metrics=metrics)
    with closing(Monitor("127.0.0.1:0", metrics, folder)) as monitor, serving(server):
        monitor.alive, monitor.ready = (lambda: server.alive), (lambda: not server.draining)
        running = Fleet(path, folder, metrics, monitor, server)
        with running.cleanup:
            yield running
