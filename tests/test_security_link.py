"""CURVE keys on real sockets: admission, isolation of sessions, and revocation."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from socket import create_server

import pytest
import zmq

from basestation.devices.authentication import check_bind
from basestation.devices.key_folder import KeyFolder
from basestation.server import Server
from device.drafting.draft_model import DraftModel
from device.link.curve_keys import CurveKeys, new_key
from device.link.link import Link
from device.session.client import Client
from device.session.session import DeviceSession
from device.settings import DraftSettings, Timeouts
from protocol.errors import AdmissionError, FaultError, SettingsError
from protocol.frames import FrameCodec
from protocol.messages import (
    Close,
    Draft,
    Fault,
    Message,
    Mode,
    Open,
    Opened,
    Sampling,
    Verdict,
)
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table, target_alone
from tests.link_pair import open_session
from tests.raw_device import hello
from tests.relay import CountingRelay
from tests.serving import serving
from tests.wait import wait_for

VOCAB = 12
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.7)
PROMPT = [3, 1, 4, 1, 5]
IDS = DraftSettings(Mode.IDS, Sampling(), 4, 4)
CODEC = FrameCodec(VOCAB)
TIMEOUTS = Timeouts(connect=5, resend=0.2, retry=10)
REVOCATION_POLL = 0.5
OPEN = Open(0, 0, Mode.IDS, Sampling(), tuple(PROMPT))


def draft_model() -> DraftModel:
    return FakeDraftModel.make(DRAFT)


def answer_of(session: DeviceSession, count: int) -> list[int]:
    return [token.token_id for token in session.answer(count)]


@dataclass
class Site:
    """A base station with keys, and its devices."""

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

    def dealer(self, keys: CurveKeys, routing_id: bytes) -> "Dealer":
        """A device with modified software, which claims any routing id."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.cleanup.callback(context.destroy, linger=0)
        socket = context.socket(zmq.DEALER)
        self.cleanup.callback(socket.close, linger=0)
        socket.setsockopt(zmq.ROUTING_ID, routing_id)
        keys.protect(socket)
        socket.connect(self.address)
        return Dealer(socket)


@dataclass
class Dealer:
    socket: "zmq.Socket[bytes]"

    def send(self, message: Message) -> None:
        self.socket.send(CODEC.encode(message))

    def receive(self, seconds: float = 5) -> Message | None:
        return CODEC.decode(self.socket.recv()) if self.socket.poll(round(seconds * 1000)) else None

    def opened(self) -> "Dealer":
        self.send(hello(VOCAB))
        assert self.receive() is not None
        self.send(OPEN)
        assert self.receive() == Opened(0, 0)
        return self


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = KeyFolder.create(tmp_path / "keys")
    with serving(Server(FakeTarget.make(TARGET), "tcp://127.0.0.1:0", keys=folder)) as server:
        site = Site(tmp_path, folder, server.address)
        with site.cleanup:
            yield site


# -- admission --


def test_an_enrolled_device_is_served(site: Site) -> None:
    session = open_session(site.client(site.keys("phone")), IDS, draft_model(), PROMPT)
    assert answer_of(session, 30) == target_alone(TARGET, PROMPT, 30)


def test_devices_are_served_independently(site: Site) -> None:
    sessions = [open_session(site.client(site.keys(f"phone{i}")), IDS, draft_model(), PROMPT[i:]) for i in range(3)]
    streams = [session.answer(10) for session in sessions]
    answers = list(zip(*([token.token_id for token in stream] for stream in streams), strict=True))
    expected = (target_alone(TARGET, PROMPT[i:], 10) for i in range(3))
    assert answers == list(zip(*expected, strict=True))


def refused(call: Callable[[], object]) -> str:
    """The message of a refusal, which arrives before the retry timeout."""
    with pytest.raises(AdmissionError) as caught:
        call()
    return str(caught.value)


def test_an_unenrolled_device_is_refused(site: Site) -> None:
    keys = site.keys("phone", enroll=False)
    text = refused(lambda: site.client(keys))
    assert site.address in text
    assert "does not know this device's key" in text


def test_a_device_can_be_enrolled_while_the_station_runs(site: Site) -> None:
    keys = site.keys("phone", enroll=False)
    refused(lambda: site.client(keys))
    site.folder.enroll("phone", zmq.curve_public(keys.secret.encode()).decode())
    assert site.client(keys).welcome.model == "table"


def test_a_station_with_another_key_is_refused(site: Site) -> None:
    keys = site.keys("phone", station=KeyFolder.create(site.path / "other").public_key)
    assert "does not have the key that --station-key names" in refused(lambda: site.client(keys))


def test_a_device_without_keys_is_refused(site: Site) -> None:
    assert "--key and --station-key" in refused(lambda: site.client(None))


def test_a_station_without_keys_is_refused_by_a_device_with_keys(site: Site) -> None:
    with serving(Server(FakeTarget.make(TARGET), "tcp://127.0.0.1:0")) as server:
        text = refused(lambda: site.client(site.keys("phone"), server.address))
    assert "uses no keys" in text


def test_a_public_key_without_its_secret_is_refused(site: Site) -> None:
    victim, thief = site.keys("phone"), site.keys("thief", enroll=False)
    dealer = site.dealer(thief, b"\x01thief")
    dealer.socket.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(victim.secret.encode()))
    dealer.socket.disconnect(site.address)
    dealer.socket.connect(site.address)
    dealer.send(hello(VOCAB))
    assert dealer.receive(1) is None


# -- isolation of sessions --


def test_another_key_cannot_read_or_change_or_end_a_session(site: Site) -> None:
    victim = site.dealer(site.keys("victim"), b"\x01same").opened()
    other = site.dealer(site.keys("other"), b"\x01same")
    expected = target_alone(TARGET, PROMPT, 5)
    for round_id in range(1, 6):
        for message in (hello(VOCAB), Close(0), Draft(0, round_id, (1, 2)), Fault(0, "state", "no"), Close(0)):
            other.send(message)
        time.sleep(0.05)
        victim.send(Draft(0, round_id, ()))
        assert victim.receive() == Verdict(0, round_id, 0, expected[round_id - 1])
    while (reply := other.receive(0.3)) is not None:
        assert not isinstance(reply, Verdict | Opened)


def test_a_session_id_is_useless_to_another_key(site: Site) -> None:
    victim = site.dealer(site.keys("victim"), b"\x01victim").opened()
    other = site.dealer(site.keys("other"), b"\x01other")
    other.send(hello(VOCAB))
    other.receive()
    for message in (Draft(0, 1, ()), Close(0), Draft(0, 1, ())):
        other.send(message)
    assert [isinstance(other.receive(), Fault) for _ in range(2)] == [True, True]
    victim.send(Draft(0, 1, ()))
    assert victim.receive() == Verdict(0, 1, 0, target_alone(TARGET, PROMPT, 1)[0])


def test_a_session_continues_over_another_connection_of_the_same_key(site: Site) -> None:
    keys = site.keys("phone")
    first = site.dealer(keys, b"\x01one").opened()
    first.socket.close(linger=0)
    second = site.dealer(keys, b"\x01two")
    second.send(Draft(0, 1, ()))
    assert second.receive() == Verdict(0, 1, 0, target_alone(TARGET, PROMPT, 1)[0])


def test_an_answer_survives_a_broken_connection(site: Site) -> None:
    port = int(site.address.rpartition(":")[2])
    with CountingRelay(port) as first:
        keys = site.keys("phone")
        session = open_session(site.client(keys, f"tcp://127.0.0.1:{first.port}"), IDS, draft_model(), PROMPT)
        stream = session.answer(20)
        tokens = [next(stream).token_id]
        first.drop_connections()
        tokens += [token.token_id for token in stream]
    assert tokens == target_alone(TARGET, PROMPT, 20)


# -- revocation --


def test_revocation_ends_the_live_session_and_no_other(site: Site) -> None:
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


def test_an_idle_session_of_a_revoked_device_receives_a_fault(site: Site) -> None:
    dealer = site.dealer(site.keys("phone"), b"\x01phone").opened()
    site.folder.revoke("phone")
    message = dealer.receive()
    assert isinstance(message, Fault)
    assert (message.session_id, message.code) == (0, "revoked")


def test_a_revoked_device_is_refused_on_old_and_new_connections(site: Site) -> None:
    keys = site.keys("phone")
    dealer = site.dealer(keys, b"\x01phone").opened()
    site.folder.revoke("phone")
    dealer.receive()
    for request in (hello(VOCAB), OPEN, Draft(0, 1, ())):
        dealer.send(request)
        message = dealer.receive()
        assert isinstance(message, Fault)
        assert (message.session_id, message.code) == (None, "revoked")
    refused(lambda: site.client(keys))


# -- a key folder that cannot be looked into --


@contextmanager
def hidden_devices(site: Site) -> Iterator[None]:
    """Put a file where the folder of enrolled devices is, as a file system that is gone would."""
    devices, away = site.path / "keys" / "devices", site.path / "away"
    devices.rename(away)
    devices.touch()
    yield
    devices.unlink()
    away.rename(devices)


def test_a_folder_that_cannot_be_looked_into_revokes_nobody(site: Site, caplog: pytest.LogCaptureFixture) -> None:
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
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    (site.path / "keys" / "revoked").touch()
    keys = site.keys("phone", enroll=False)
    assert "does not know this device's key" in refused(lambda: site.client(keys))
    assert any("cannot tell whether a key is revoked" in record.message for record in caplog.records)


def test_a_device_that_cannot_be_looked_up_is_admitted_later(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    keys, manifest = site.keys("phone"), draft_model().manifest
    with ThreadPoolExecutor() as pool:
        with hidden_devices(site):
            greeting = pool.submit(Client, site.link(keys), manifest, Timeouts(connect=30, resend=0.2))
            wait_for(lambda: "cannot tell whether a key is enrolled" in caplog.text)
            assert not greeting.done()
        session = open_session(greeting.result(), IDS, draft_model(), PROMPT)
        assert answer_of(session, 10) == target_alone(TARGET, PROMPT, 10)


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


def test_connections_that_use_up_all_descriptors_revoke_nobody(site: Site) -> None:
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


def test_a_new_key_can_take_the_name_of_a_revoked_device(site: Site) -> None:
    keys = site.keys("phone")
    site.folder.revoke("phone")
    (site.path / "phone").unlink()
    (site.path / "phone.pub").unlink()
    assert site.client(site.keys("phone")).welcome.model == "table"
    refused(lambda: site.client(keys))


# -- byte counts and bind addresses --


def test_invariant_6_counted_bytes_with_curve_equal_those_of_a_relay(site: Site) -> None:
    port = int(site.address.rpartition(":")[2])
    with CountingRelay(port) as relay:
        link = site.link(site.keys("phone"), f"tcp://127.0.0.1:{relay.port}")
        client = Client(link, draft_model().manifest, TIMEOUTS)
        before, counted = relay.wait_until_idle(), (link.uplink_bytes, link.downlink_bytes)
        answer_of(open_session(client, IDS, draft_model(), PROMPT * 60), 20)
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
