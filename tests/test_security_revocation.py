"""Revoked devices, and key folders that cannot be looked into, on real sockets."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from device.session.client import Client
from device.settings import Timeouts
from protocol.errors import FaultError
from protocol.messages import Draft, Fault
from tests.fakes import PROMPT, TARGET, VOCAB, target_alone
from tests.invariants import token_ids_of
from tests.key_site import OPEN, KeySite, draft_model, key_site, refused
from tests.link_pair import IDS, open_session
from tests.raw_device import hello
from tests.wait import wait_for

REVOCATION_POLL = 0.5


@pytest.fixture
def site(tmp_path: Path) -> Iterator[KeySite]:
    with key_site(tmp_path) as site:
        yield site


def test_revocation_ends_the_live_session_and_no_other(site: KeySite) -> None:
    revoked, kept = (
        open_session(site.client(site.keys(name)), IDS, draft_model(), PROMPT) for name in ("revoked", "kept")
    )
    streams = revoked.answer(10_000), kept.answer(1000)
    tokens = [next(streams[1]).token_id]
    next(streams[0])
    site.folder.revoke("revoked")
    with pytest.raises(FaultError, match="key was revoked") as caught:
        list(streams[0])
    assert caught.value.fault_code == "revoked"
    tokens += [token.token_id for token in streams[1]]
    assert tokens == target_alone(TARGET, PROMPT, 1000)


def test_an_idle_session_of_a_revoked_device_receives_a_fault(site: KeySite) -> None:
    peer = site.opened(site.keys("phone"), b"\x01phone")
    site.folder.revoke("phone")
    message = peer.receive()
    assert isinstance(message, Fault)
    assert (message.session_id, message.code) == (0, "revoked")


def test_a_revoked_device_is_refused_on_old_and_new_connections(site: KeySite) -> None:
    keys = site.keys("phone")
    peer = site.opened(keys, b"\x01phone")
    site.folder.revoke("phone")
    peer.receive()
    for request in (hello(VOCAB), OPEN, Draft(0, 1, ())):
        peer.send(request)
        message = peer.receive()
        assert isinstance(message, Fault)
        assert (message.session_id, message.code) == (None, "revoked")
    refused(lambda: site.client(keys))


# -- a key folder that cannot be looked into --


@contextmanager
def hidden_devices(site: KeySite) -> Iterator[None]:
    """Put a file where the folder of enrolled devices is, as a file system that is gone would."""
    devices, away = site.path / "keys" / "devices", site.path / "away"
    devices.rename(away)
    devices.touch()
    yield
    devices.unlink()
    away.rename(devices)


def test_a_folder_that_cannot_be_looked_into_revokes_nobody(site: KeySite, caplog: pytest.LogCaptureFixture) -> None:
    session = open_session(site.client(site.keys("phone")), IDS, draft_model(), PROMPT)
    tokens = session.answer(60)
    first = [next(tokens) for _ in range(30)]
    with hidden_devices(site):
        time.sleep(2 * REVOCATION_POLL)
        answer = [token.token_id for token in [*first, *tokens]]
    assert answer == target_alone(TARGET, PROMPT, 60)
    lines = [record.message for record in caplog.records if "cannot tell whether a key is enrolled" in record.message]
    assert len(lines) == 1


def test_a_refused_device_is_refused_all_the_same_where_revoked_keys_cannot_be_looked_up(
    site: KeySite, caplog: pytest.LogCaptureFixture
) -> None:
    (site.path / "keys" / "revoked").touch()
    keys = site.keys("phone", enroll=False)
    assert "does not know this device's key" in refused(lambda: site.client(keys))
    assert any("cannot tell whether a key is revoked" in record.message for record in caplog.records)


def test_a_device_that_cannot_be_looked_up_is_admitted_later(site: KeySite, caplog: pytest.LogCaptureFixture) -> None:
    keys, manifest = site.keys("phone"), draft_model().manifest
    with ThreadPoolExecutor() as pool:
        with hidden_devices(site):
            greeting = pool.submit(Client, site.link(keys), manifest, Timeouts(connect=30, resend=0.2))
            wait_for(lambda: "cannot tell whether a key is enrolled" in caplog.text)
            assert not greeting.done()
        session = open_session(greeting.result(), IDS, draft_model(), PROMPT)
        assert token_ids_of(session, 10) == target_alone(TARGET, PROMPT, 10)


@contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    """Leave this process only ``spare`` more descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


FLOOD = """
import socket, sys
input()
connections = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), 5) for _ in range(100)]
print("open", flush=True)
input()
"""


def test_connections_that_use_up_all_descriptors_revoke_nobody(site: KeySite) -> None:
    session = open_session(site.client(site.keys("phone")), IDS, draft_model(), PROMPT)
    tokens = session.answer(60)
    first = [next(tokens) for _ in range(30)]
    command = [sys.executable, "-c", FLOOD, site.address.rpartition(":")[2]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as flood:
        assert flood.stdin is not None
        assert flood.stdout is not None
        with few_descriptors(40):
            flood.stdin.write("\n")
            flood.stdin.flush()
            assert flood.stdout.readline() == "open\n"
            time.sleep(2 * REVOCATION_POLL)
            with pytest.raises(OSError, match="Too many open files"):
                Path(os.devnull).open().close()
            answer = [token.token_id for token in [*first, *tokens]]
        flood.kill()
    assert answer == target_alone(TARGET, PROMPT, 60)


def test_a_new_key_can_take_the_name_of_a_revoked_device(site: KeySite) -> None:
    keys = site.keys("phone")
    site.folder.revoke("phone")
    (site.path / "phone").unlink()
    (site.path / "phone.pub").unlink()
    assert site.client(site.keys("phone")).welcome.model == "table"
    refused(lambda: site.client(keys))
