"""CURVE keys on real sockets: admission and isolation of sessions."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from socket import create_server

import pytest
import zmq

from basestation.devices.authentication import check_bind
from basestation.devices.key_folder import KeyFolder
from basestation.server import Server
from device.link.link import Link
from device.session.client import Client
from protocol.errors import SettingsError
from protocol.messages import Close, Draft, Fault, Opened, Verdict
from tests.fakes import PROMPT, TARGET, VOCAB, FakeTarget, target_alone
from tests.invariants import token_ids_of
from tests.key_site import TIMEOUTS, KeySite, draft_model, key_site, refused
from tests.link_pair import IDS, open_session
from tests.raw_device import CODEC, hello
from tests.relay import CountingRelay, port_of
from tests.serving import ANY_PORT, serving


@pytest.fixture
def site(tmp_path: Path) -> Iterator[KeySite]:
    with key_site(tmp_path) as site:
        yield site


# -- admission --


def test_an_enrolled_device_is_served(site: KeySite) -> None:
    session = open_session(site.client(site.keys("phone")), IDS, draft_model(), PROMPT)
    assert token_ids_of(session, 30) == target_alone(TARGET, PROMPT, 30)


def test_devices_are_served_independently(site: KeySite) -> None:
    sessions = [open_session(site.client(site.keys(f"phone{i}")), IDS, draft_model(), PROMPT[i:]) for i in range(3)]
    streams = [session.answer(10) for session in sessions]
    answers = list(zip(*([token.token_id for token in stream] for stream in streams), strict=True))
    expected = (target_alone(TARGET, PROMPT[i:], 10) for i in range(3))
    assert answers == list(zip(*expected, strict=True))


def test_an_unenrolled_device_is_refused(site: KeySite) -> None:
    keys = site.keys("phone", enroll=False)
    text = refused(lambda: site.client(keys))
    assert site.address in text
    assert "does not know this device's key" in text


def test_a_device_can_be_enrolled_while_the_station_runs(site: KeySite) -> None:
    keys = site.keys("phone", enroll=False)
    refused(lambda: site.client(keys))
    site.folder.enroll("phone", zmq.curve_public(keys.secret.encode()).decode())
    assert site.client(keys).welcome.model == "table"


def test_a_station_with_another_key_is_refused(site: KeySite) -> None:
    keys = site.keys("phone", station=KeyFolder.create(site.path / "other").public_key)
    assert "does not have the key that --station-key names" in refused(lambda: site.client(keys))


def test_a_device_without_keys_is_refused(site: KeySite) -> None:
    assert "--key and --station-key" in refused(lambda: site.client(None))


def test_a_station_without_keys_is_refused_by_a_device_with_keys(site: KeySite) -> None:
    with serving(Server(FakeTarget.make(TARGET), ANY_PORT)) as server:
        text = refused(lambda: site.client(site.keys("phone"), server.address))
    assert "uses no keys" in text


def test_a_public_key_without_its_secret_is_refused(site: KeySite) -> None:
    victim, thief = site.keys("phone"), site.keys("thief", enroll=False)
    peer = site.peer(thief, b"\x01thief")
    peer.socket.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(victim.secret.encode()))
    peer.socket.disconnect(site.address)
    peer.socket.connect(site.address)
    peer.send(hello(VOCAB))
    assert peer.receive(1) is None


# -- isolation of sessions --


def test_another_key_cannot_read_or_change_or_end_a_session(site: KeySite) -> None:
    victim = site.opened(site.keys("victim"), b"\x01same")
    other = site.peer(site.keys("other"), b"\x01same")
    expected = target_alone(TARGET, PROMPT, 5)
    for round_id in range(1, 6):
        for message in (hello(VOCAB), Close(0), Draft(0, round_id, (1, 2)), Fault(0, "state", "no"), Close(0)):
            other.send(message)
        time.sleep(0.05)
        victim.send(Draft(0, round_id, ()))
        assert victim.receive() == Verdict(0, round_id, 0, expected[round_id - 1])
    while (reply := other.receive(0.3)) is not None:
        assert not isinstance(reply, Verdict | Opened)


def test_a_session_id_is_useless_to_another_key(site: KeySite) -> None:
    victim = site.opened(site.keys("victim"), b"\x01victim")
    other = site.peer(site.keys("other"), b"\x01other")
    other.send(hello(VOCAB))
    other.receive()
    for message in (Draft(0, 1, ()), Close(0), Draft(0, 1, ())):
        other.send(message)
    assert [isinstance(other.receive(), Fault) for _ in range(2)] == [True, True]
    victim.send(Draft(0, 1, ()))
    assert victim.receive() == Verdict(0, 1, 0, target_alone(TARGET, PROMPT, 1)[0])


def test_a_session_continues_over_another_connection_of_the_same_key(site: KeySite) -> None:
    keys = site.keys("phone")
    first = site.opened(keys, b"\x01one")
    first.socket.close(linger=0)
    second = site.peer(keys, b"\x01two")
    second.send(Draft(0, 1, ()))
    assert second.receive() == Verdict(0, 1, 0, target_alone(TARGET, PROMPT, 1)[0])


def test_an_answer_survives_a_broken_connection(site: KeySite) -> None:
    port = port_of(site.address)
    with CountingRelay(port) as first:
        keys = site.keys("phone")
        session = open_session(site.client(keys, f"tcp://127.0.0.1:{first.port}"), IDS, draft_model(), PROMPT)
        stream = session.answer(20)
        tokens = [next(stream).token_id]
        first.drop_connections()
        tokens += [token.token_id for token in stream]
    assert tokens == target_alone(TARGET, PROMPT, 20)


# -- byte counts and bind addresses --


def test_invariant_6_counted_bytes_with_curve_equal_those_of_a_relay(site: KeySite) -> None:
    port = port_of(site.address)
    with CountingRelay(port) as relay:
        link = site.link(site.keys("phone"), f"tcp://127.0.0.1:{relay.port}")
        client = Client(link, draft_model().manifest, TIMEOUTS)
        before, counted = relay.wait_until_idle(), (link.uplink_bytes, link.downlink_bytes)
        token_ids_of(open_session(client, IDS, draft_model(), PROMPT * 60), 20)
        after = relay.wait_until_idle()
        counted = link.uplink_bytes - counted[0], link.downlink_bytes - counted[1]
    assert counted == (after[0] - before[0], after[1] - before[1])


@pytest.mark.parametrize(
    "bind",
    ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0", "tcp://192.0.2.1:0", "tcp://eth0:0", "tcp://127.0.0.1.example:0"],
)
def test_a_public_address_needs_keys_or_insecure(bind: str) -> None:
    with pytest.raises(SettingsError, match="--keys DIR, or --insecure"):
        Server(FakeTarget.make(TARGET), bind)
    check_bind(bind, allowed=True)


@pytest.mark.parametrize(
    "bind", ["tcp://127.0.0.1:0", "tcp://127.1.2.3:0", "tcp://[::1]:0", "tcp://localhost:0", "ipc://x"]
)
def test_a_loopback_address_needs_neither(bind: str) -> None:
    check_bind(bind, allowed=False)


def test_an_insecure_station_serves_any_device() -> None:
    with serving(Server(FakeTarget.make(TARGET), "tcp://0.0.0.0:0", insecure=True)) as server:
        link = Link.connect(server.address.replace("0.0.0.0", "127.0.0.1"), CODEC)  # noqa: S104
        assert Client(link, draft_model().manifest, TIMEOUTS).welcome.model == "table"
        link.close()


def test_an_invalid_bind_is_refused_before_the_target_is_loaded() -> None:
    command = [sys.executable, "-m", "basestation", "serve", "--target", "nowhere", "--bind", "tcp://0.0.0.0:5755"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: bind is 'tcp://0.0.0.0:5755'; allowed: ")


def test_a_port_in_use_is_refused_before_the_target_is_loaded() -> None:
    with create_server(("127.0.0.1", 0)) as used:
        bind = f"tcp://127.0.0.1:{used.getsockname()[1]}"
        command = [sys.executable, "-m", "basestation", "serve", "--target", "nowhere", "--bind", bind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot bind '{bind}'")
