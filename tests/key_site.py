"""A base station with keys on a real socket, and its devices, over models without weights."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from basestation.devices.key_folder import KeyFolder
from basestation.server import Server
from device.drafting.draft_model import DraftModel
from device.link.curve_keys import CurveKeys, new_key
from device.link.link import Link
from device.session.client import Client
from device.settings import Timeouts
from protocol.errors import AdmissionError
from protocol.messages import Mode, Open, Opened, Sampling
from tests.fakes import DRAFT, PROMPT, TARGET, VOCAB, FakeDraftModel, FakeTarget
from tests.raw_device import CODEC, hello
from tests.raw_peer import RawPeer
from tests.serving import ANY_PORT, serving

TIMEOUTS = Timeouts(connect=5, resend=0.2, retry=10)
OPEN = Open(0, 0, Mode.IDS, Sampling(), tuple(PROMPT))


def draft_model() -> DraftModel:
    return FakeDraftModel.make(DRAFT)


@dataclass
class KeySite:
    path: Path
    folder: KeyFolder
    address: str
    cleanup: ExitStack = field(default_factory=ExitStack)

    def keys(self, name: str, enroll: bool = True, station: str | None = None) -> CurveKeys:
        path = self.path / name
        public = new_key(path)
        if enroll:
            self.folder.enroll(name, public)
        return CurveKeys.read(path, station or self.folder.public_key)

    def link(self, keys: CurveKeys | None, address: str | None = None) -> Link:
        link = Link.connect(address or self.address, CODEC, keys)
        self.cleanup.callback(link.close)
        return link

    def client(self, keys: CurveKeys | None, address: str | None = None) -> Client:
        return Client(self.link(keys, address), draft_model().manifest, TIMEOUTS)

    def peer(self, keys: CurveKeys, routing_id: bytes) -> RawPeer:
        return RawPeer(self.address, self.cleanup, keys, routing_id)

    def opened(self, keys: CurveKeys, routing_id: bytes) -> RawPeer:
        """A peer with an open session."""
        peer = self.peer(keys, routing_id)
        assert peer.request(hello(VOCAB)) is not None
        assert peer.request(OPEN) == Opened(0, 0)
        return peer


@contextmanager
def key_site(path: Path) -> Iterator[KeySite]:
    folder = KeyFolder.create(path / "keys")
    with serving(Server(FakeTarget.make(TARGET), ANY_PORT, keys=folder)) as server:
        site = KeySite(path, folder, server.address)
        with site.cleanup:
            yield site


def refused(call: Callable[[], object]) -> str:
    """The message of a refusal, which arrives before the retry timeout."""
    with pytest.raises(AdmissionError) as caught:
        call()
    return str(caught.value)
