"""Addresses of base stations: which are valid, over which protocol they are reached, and what answers there instead."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from basestation.devices.authentication import check_bind
from basestation.devices.key_folder import KeyFolder
from basestation.server import Server
from common.loopback import is_loopback
from device.link import version_lookup
from device.link.connection import Connection
from device.link.curve_keys import CurveKeys, new_key
from device.link.link import Link
from device.link.probe import endpoint, needs_ipv6, unreachable_reason
from device.session.client import Client
from device.settings import Timeouts
from protocol.errors import AdmissionError, LinkError, SettingsError
from protocol.frames import FrameCodec
from tests.fakes import FakeDraftModel, FakeTarget, random_table, target_alone
from tests.link_pair import IDS, open_session
from tests.serving import ANY_PORT, serving
from tests.wait import wait_for

TABLE = random_table(12, seed=1)
PROMPT = [3, 1, 4]
TIMEOUTS = Timeouts(connect=5, resend=0.2, retry=5)


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


IPV6 = has_ipv6()
ON_LOOPBACK = ["tcp://127.0.0.1:0", *(["tcp://[::1]:0"] if IPV6 else [])]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("tcp://10.0.0.5:5755", ("10.0.0.5", 5755)),
        ("tcp://station.example:1", ("station.example", 1)),
        ("tcp://my_station:65535", ("my_station", 65535)),
        ("tcp://bücher.example:5755", ("bücher.example", 5755)),
        ("tcp://[::1]:5755", ("::1", 5755)),
        ("tcp://[fd00::5]:5755", ("fd00::5", 5755)),
        ("tcp://[fe80::1%eth0]:5755", ("fe80::1%eth0", 5755)),
        ("tcp://[::ffff:10.0.0.5]:5755", ("::ffff:10.0.0.5", 5755)),
    ],
)
def test_an_address_has_a_host_and_a_port(address: str, expected: tuple[str, int]) -> None:
    assert endpoint(address) == expected


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:5755",
        "localhost",
        "http://127.0.0.1:5755",
        "TCP://127.0.0.1:5755",
        "tcp:127.0.0.1:5755",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:99999",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:+5",
        "tcp://127.0.0.1:text",
        "tcp://127.0.0.1:\N{ARABIC-INDIC DIGIT FIVE}",
        "tcp://127.0.0.1:5755/",
        "tcp://127.0.0.1:5755/path",
        "tcp://127.0.0.1:5755?x",
        "tcp://127.0.0.1:5755#x",
        "tcp://user@127.0.0.1:5755",
        " tcp://127.0.0.1:5755",
        "tcp://127.0.0.1:5755 ",
        "tcp://127.0.0.1:5755\n",
        "tcp://127.0.0. 1:5755",
        "tcp://:5755",
        "tcp://::1:5755",
        "tcp://[::1]",
        "tcp://[::1:5755",
        "tcp://::1]:5755",
        "tcp://[]:5755",
        "tcp://[station]:5755",
        "tcp://a..b:5755",
        f"tcp://{64 * 'a'}.example:5755",
        "tcp://a\udcffb:5755",
        "ipc:///tmp/station",
    ],
)
def test_another_text_is_refused_with_what_is_allowed(address: str) -> None:
    for use in (endpoint, needs_ipv6, lambda text: Link.connect(text, FrameCodec(12))):
        with pytest.raises(SettingsError, match=r"^server is .*; allowed: tcp://HOST:PORT") as caught:
            use(address)
        assert "\n" not in str(caught.value)
    assert unreachable_reason(address) == "it is not a TCP address"


def resolving(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Let every name resolve to these addresses, in this order."""
    real = socket.getaddrinfo

    def resolve(_: str, port: int, **options: Any) -> list[Any]:
        return [answer for host in hosts for answer in real(host, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["127.0.0.1"], False),
        (["::1"], True),
        (["::1", "127.0.0.1"], False),
        (["127.0.0.1", "::1"], False),
        (["fd00::5", "fd00::6"], True),
    ],
)
def test_ipv6_is_used_only_where_there_is_no_ipv4_address(
    hosts: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, *hosts)
    assert needs_ipv6("tcp://station.example:5755") is expected


def connected(address: str, keys: CurveKeys | None = None) -> Client:
    link = Link.connect(address, FrameCodec(12), keys)
    try:
        return Client(link, FakeDraftModel.make(TABLE).manifest, TIMEOUTS)
    except BaseException:
        link.close()
        raise


def check_answer(address: str, keys: CurveKeys | None = None) -> None:
    """Connect, and compare an answer with the target's own."""
    client = connected(address, keys)
    try:
        session = open_session(client, IDS, FakeDraftModel.make(TABLE), PROMPT)
        assert [token.token_id for token in session.answer(8)] == target_alone(TABLE, PROMPT, 8)
        session.close()
    finally:
        client.close()


@pytest.mark.parametrize("bind", ON_LOOPBACK)
def test_both_ends_use_the_same_form_of_address(bind: str) -> None:
    with serving(Server(FakeTarget.make(TABLE), bind)) as server:
        assert server.address.startswith(bind.removesuffix("0"))
        check_answer(server.address)


@pytest.mark.parametrize("bind", ON_LOOPBACK)
def test_keys_work_over_either_protocol(bind: str, tmp_path: Path) -> None:
    folder = KeyFolder.create(tmp_path / "keys")
    folder.enroll("one", new_key(tmp_path / "one"))
    new_key(tmp_path / "two")
    with serving(Server(FakeTarget.make(TABLE), bind, keys=folder)) as server:
        check_answer(server.address, CurveKeys.read(tmp_path / "one", folder.public_key))
        with pytest.raises(AdmissionError):
            connected(server.address, CurveKeys.read(tmp_path / "two", folder.public_key))


def test_a_name_with_both_addresses_reaches_a_station_on_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Server(FakeTarget.make(TABLE), ANY_PORT)) as server:
        resolving(monkeypatch, "::1", "127.0.0.1")
        check_answer(server.address.replace("127.0.0.1", "localhost"))


@pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
def test_a_host_that_turns_out_to_need_ipv6_is_connected_to_over_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_lookup, "_INTERVAL", 0.05)
    with serving(Server(FakeTarget.make(TABLE), "tcp://[::1]:0")) as server:
        link = Link.connect(server.address, FrameCodec(12), ipv6=False)
        device = link.device
        try:
            wait_for(lambda: link.receive(0.05) is None and link.connections == 1)
            assert Client(link, FakeDraftModel.make(TABLE).manifest, TIMEOUTS).welcome.model == "table"
            assert link.device == device
        finally:
            link.close()


def test_a_station_that_cannot_bind_says_so() -> None:
    with serving(Server(FakeTarget.make(TABLE), ANY_PORT)) as server:
        for bind in (server.address, "tcp://\udcff:5755"):
            with pytest.raises(LinkError, match="cannot bind"):
                Server(FakeTarget.make(TABLE), bind, insecure=True)
    for bind in ("tcp://127.0.0.1:text", "tcp://[::1", "", "127.0.0.1:5755"):
        with pytest.raises(SettingsError, match="allowed: tcp://ADDRESS:PORT"):
            Server(FakeTarget.make(TABLE), bind, insecure=True)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("tcp://[::1]:5755", True),
        ("tcp://127.0.0.1:5755", True),
        ("tcp://localhost:5755", True),
        ("tcp://[::]:5755", False),
        ("tcp://[fd00::5]:5755", False),
        ("tcp://[fe80::1%eth0]:5755", False),
        ("tcp://[::ffff:10.0.0.5]:5755", False),
        ("tcp://[::1@10.0.0.5]:5755", False),
        ("tcp://127.0.0.1@10.0.0.5:5755", False),
        ("tcp://*:5755", False),
        ("tcp://::1:5755", False),
    ],
)
def test_other_machines_reach_a_station_only_with_keys_or_when_told(address: str, local: bool) -> None:
    assert is_loopback(address) is local
    if local:
        check_bind(address, allowed=False)
    else:
        with pytest.raises(SettingsError, match=r"^bind is "):
            check_bind(address, allowed=False)
    check_bind(address, allowed=True)


@contextmanager
def answering(greet: Callable[[socket.socket], object]) -> Iterator[str]:
    """A TCP server that treats each connection in this way."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    greet(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def speak(text: bytes) -> Callable[[socket.socket], object]:
    return lambda connection: connection.sendall(text)


def answer_http(connection: socket.socket) -> None:
    if connection.recv(100).startswith(b"GET / "):
        connection.sendall(b"HTTP/1.0 404 Not Found\r\n\r\n")


@pytest.mark.parametrize(
    ("greet", "expected"),
    [
        (answer_http, "an HTTP server listens there"),
        (speak(b"SSH-2.0-server\r\n"), "what listens there is not a base station"),
        (speak(b""), "what listens there is not a base station"),
        (lambda connection: connection.recv(100), "what listens there is not a base station"),
    ],
)
def test_another_server_is_recognised(
    greet: Callable[[socket.socket], object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("device.link.probe._TIMEOUT", 0.1)
    with answering(greet) as address:
        assert unreachable_reason(address).startswith(expected)


def test_a_zeromq_socket_that_is_silent_is_recognised() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context.socket(zmq.PULL) as silent:
        port = silent.bind_to_random_port("tcp://127.0.0.1")
        assert unreachable_reason(f"tcp://127.0.0.1:{port}").startswith("a ZeroMQ peer listens there")
    context.destroy(linger=0)


def test_an_address_at_which_nothing_listens_is_recognised() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert unreachable_reason(f"tcp://127.0.0.1:{port}").startswith("nothing listens there; start one with")


def test_the_reason_is_that_of_the_address_the_link_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    if not IPV6:
        assert unreachable_reason("tcp://[::1]:5755").startswith("no connection is established")
        return
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        resolving(monkeypatch, "::1", "127.0.0.1")
        assert unreachable_reason(f"tcp://station.example:{listener.getsockname()[1]}").startswith(
            "nothing listens there; start one with"
        )


def test_a_name_that_does_not_resolve_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with serving(Server(FakeTarget.make(TABLE), ANY_PORT)) as server:
        address = server.address.replace("127.0.0.1", "localhost")
        connection = Connection(lambda: connected(address))
        with monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", fail)
            with pytest.raises(LinkError, match=r"'localhost' of .* does not resolve \(Name or service not known\)"):
                connection.client()
            connection.keep_alive()
            alive = [connection.alive]
            assert "Name or service" in unreachable_reason(address)
        connection.keep_alive()
        assert [*alive, connection.alive] == [False, True]
        connection.close()
