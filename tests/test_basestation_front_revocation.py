"""Revoked devices at a front: their sessions end at every replica, whoever admitted them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from basestation.devices.key_folder import KeyFolder
from basestation.replicas.inner_link import Delivery, InnerSocket
from basestation.replicas.inner_messages import Command
from device.link.curve_keys import CurveKeys, new_key
from device.link.link import Link
from device.session.client import Client
from device.settings import Timeouts
from protocol.errors import FaultError
from protocol.limits import Limits
from protocol.messages import Mode, Open, Opened, Sampling, Welcome
from tests.fakes import DRAFT, PROMPT, TARGET, VOCAB, FakeDraftModel, FakeTarget
from tests.front_site import FrontSite, RunningReplica, front_site
from tests.link_pair import IDS, open_session
from tests.raw_device import CODEC, hello
from tests.raw_peer import RawPeer
from tests.wait import wait_for

TOKENS = 60
TIMEOUTS = Timeouts(connect=10, resend=1, retry=20)


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def folder(tmp_path: Path) -> KeyFolder:
    return KeyFolder.create(tmp_path / "keys")


@pytest.fixture
def phone(tmp_path: Path, folder: KeyFolder) -> CurveKeys:
    folder.enroll("phone", new_key(tmp_path / "phone"))
    return CurveKeys.read(tmp_path / "phone", folder.public_key)


@contextmanager
def opened_with_keys(folder: KeyFolder, keys: CurveKeys) -> Iterator[tuple[FrontSite, RunningReplica]]:
    """A front with a replica, which has a session of the device."""
    with front_site(keys=folder, expected=1) as site, ExitStack() as cleanup:
        replica = site.start_replica("replica-0", FakeTarget.make(TARGET))
        site.wait_for_replicas(1)
        peer = RawPeer(site.address, cleanup, keys)
        assert isinstance(peer.request(hello(VOCAB)), Welcome)
        assert peer.request(Open(0, 0, Mode.IDS, Sampling(), tuple(PROMPT))) == Opened(0, 0)
        yield site, replica


def test_a_device_that_was_revoked_before_the_front_started_loses_its_sessions(
    folder: KeyFolder, phone: CurveKeys
) -> None:
    with opened_with_keys(folder, phone) as (site, replica):
        site.stop_front()
        folder.revoke("phone")
        site.start_front()
        wait_for(lambda: replica.open_sessions == 0)


def test_a_new_front_that_cannot_look_into_the_key_folder_ends_no_session(
    folder: KeyFolder, phone: CurveKeys, tmp_path: Path
) -> None:
    devices, reports = tmp_path / "keys" / "devices", set[float]()
    with opened_with_keys(folder, phone) as (site, replica):
        site.stop_front()
        devices.rename(tmp_path / "away")
        devices.touch()
        site.start_front()

        def has_reported_several_times() -> bool:
            reports.update(one.heard_at for one in site.front.routing.replicas.values())
            return len(reports) > 3

        wait_for(has_reported_several_times)
        assert replica.open_sessions == 1
        devices.unlink()
        (tmp_path / "away").rename(devices)
        folder.revoke("phone")
        wait_for(lambda: replica.open_sessions == 0)


def test_a_replica_that_did_not_take_a_revocation_is_told_again(
    folder: KeyFolder, phone: CurveKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, dropped = InnerSocket.send, list[bytes]()

    def drop_first(self: InnerSocket, replica: bytes, parts: Sequence[bytes]) -> Delivery:
        if parts[0][0] == Command.REVOKE and not dropped:
            dropped.append(replica)
            return Delivery.DROPPED
        return send(self, replica, parts)

    monkeypatch.setattr(InnerSocket, "send", drop_first)
    with opened_with_keys(folder, phone) as (_, replica):
        folder.revoke("phone")
        wait_for(lambda: replica.open_sessions == 0)
    assert len(dropped) == 1


def test_a_revoked_device_is_told_and_its_sessions_end_at_every_replica(
    folder: KeyFolder, phone: CurveKeys, cleanup: ExitStack
) -> None:
    with front_site(Limits(max_sessions=32), folder) as site:
        replicas = [site.start_replica(name, FakeTarget.make(TARGET)) for name in ("replica-0", "replica-1")]
        site.wait_for_replicas(2)
        model = FakeDraftModel.make(DRAFT)
        link = Link.connect(site.address, CODEC, phone)
        cleanup.callback(link.close)
        client = Client(link, model.manifest, TIMEOUTS)
        sessions = [open_session(client, IDS, FakeDraftModel.make(DRAFT), PROMPT) for _ in range(16)]
        assert min(replica.open_sessions for replica in replicas) > 0  # the proposed one is overloaded
        answer = sessions[0].answer(TOKENS)
        next(answer)
        folder.revoke("phone")
        wait_for(lambda: all(replica.open_sessions == 0 for replica in replicas))
        with pytest.raises(FaultError) as caught:
            list(answer)
    assert caught.value.fault_code == "revoked"
