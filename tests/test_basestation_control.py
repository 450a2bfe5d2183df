"""How ``scale`` and ``restart`` reach a base station that serves on this machine."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from basestation.replicas import control
from basestation.replicas.control import Control, Restart, Scale, control_file, send_request
from protocol.errors import LinkError
from tests.wait import wait_for

BIND = "tcp://127.0.0.1:5755"
EVERYWHERE = "tcp://0.0.0.0:5755"
ELSEWHERE = "tcp://10.0.0.2:5755"


@pytest.fixture(autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short path, as those of sockets have to be."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("s")))


@pytest.fixture
def stations() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def station(stations: ExitStack, endpoint: str = BIND) -> Control:
    return stations.enter_context(closing(Control(control_file(endpoint))))


def sent(path: Path, data: bytes) -> bytes:
    """What the answer is to some bytes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(100)


def test_requests_arrive_in_order_and_once(stations: ExitStack) -> None:
    one = station(stations)
    for request in (Scale(3), Restart(), Scale(2)):
        send_request(BIND, request)
    assert list(one.requests()) == [Scale(3), Restart(), Scale(2)]
    assert list(one.requests()) == []


def test_a_file_that_a_killed_process_left_is_replaced(stations: ExitStack) -> None:
    control_file(BIND).parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(control_file(BIND)))
    one = station(stations)
    send_request(BIND, Scale(4))
    assert list(one.requests()) == [Scale(4)]


def test_a_base_station_that_listens_keeps_its_file(stations: ExitStack) -> None:
    one = station(stations)
    with pytest.raises(LinkError, match="another base station listens there"):
        Control(control_file(BIND))
    send_request(BIND, Restart())
    assert list(one.requests()) == [Restart()]


def test_without_a_base_station_there_is_one_line() -> None:
    with pytest.raises(LinkError, match="no base station with --replicas answers"):
        send_request(BIND, Restart())


def test_base_stations_at_one_port_of_several_addresses_have_files_of_their_own(stations: ExitStack) -> None:
    here, there = station(stations), station(stations, ELSEWHERE)
    send_request(ELSEWHERE, Scale(2))
    send_request(BIND, Scale(3))
    assert (list(here.requests()), list(there.requests())) == ([Scale(3)], [Scale(2)])
    assert control_file(BIND) != control_file("tcp://127.0.0.1:5756")


@pytest.mark.parametrize("bind", [BIND, EVERYWHERE, "tcp://*:5755", "tcp://localhost:5755", ELSEWHERE])
@pytest.mark.parametrize("endpoint", [EVERYWHERE, "tcp://[::]:5755"])
def test_a_base_station_at_all_addresses_is_found_by_each(bind: str, endpoint: str, stations: ExitStack) -> None:
    one = station(stations, endpoint)
    send_request(bind, Scale(3))
    assert list(one.requests()) == [Scale(3)]


@pytest.mark.parametrize(
    "data", [b"\n", b"\x80\x04", b"x" * 1000, b"[]\n", b'{"scale": 0}\n', b'{"scale": "2"}\n', b'{"restart": 1}\n']
)
def test_what_is_no_request_is_refused_and_the_next_one_is_taken(data: bytes, stations: ExitStack) -> None:
    one = station(stations)
    assert sent(control_file(BIND), data) == b"not understood\n"
    send_request(BIND, Scale(3))
    assert list(one.requests()) == [Scale(3)]


def test_requests_are_taken_after_a_connection_that_could_not_be_accepted(
    stations: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, failed = socket.socket.accept, threading.Event()

    def fail_once(self: socket.socket) -> object:
        if not failed.is_set():
            failed.set()
            raise OSError(24, "Too many open files")
        return accept(self)

    monkeypatch.setattr(control, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(socket.socket, "accept", fail_once)
    one = station(stations)
    wait_for(failed.is_set)
    send_request(BIND, Scale(3))
    assert list(one.requests()) == [Scale(3)]


def test_a_base_station_that_stops_removes_its_file_alone(stations: ExitStack) -> None:
    station(stations, ELSEWHERE)
    with closing(Control(control_file(BIND))):
        assert control_file(BIND).exists()
    assert not control_file(BIND).exists()
    assert control_file(ELSEWHERE).exists()
