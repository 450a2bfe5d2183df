"""The monitor's connections: how many there are, and how long a client may keep one."""

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from basestation.monitoring import monitor
from basestation.monitoring.fleet_page import PageFile
from basestation.monitoring.metrics import Metrics
from basestation.monitoring.monitor import Monitor
from tests.wait import wait_for

LARGE = 2**26
"""Bytes of a page that no socket buffers."""


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Monitor]:
    monkeypatch.setattr(monitor, "read_page", lambda: {"/": PageFile("text/plain", bytes(LARGE))})
    with closing(Monitor("127.0.0.1:0", Metrics())) as served:
        yield served


def connect(served: Monitor) -> socket.socket:
    parts = urlsplit(served.url)
    return socket.create_connection((parts.hostname, parts.port or 0), timeout=20)


def accepts(client: socket.socket, sent: bytes) -> bool:
    try:
        client.sendall(sent)
    except ConnectionError:
        return False
    return True


def is_healthy(served: Monitor) -> bool:
    try:
        with urllib.request.urlopen(f"{served.url}/healthz", timeout=5) as answer:  # noqa: S310 - the test's own server
            return bool(answer.status == 200)
    except OSError:
        return False


def test_a_client_that_sends_its_request_byte_by_byte_does_not_keep_its_connection(
    served: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "_CONNECTION_SECONDS", 0.2)
    with connect(served) as slow:
        wait_for(lambda: not accepts(slow, b"G"))


def test_a_client_that_does_not_read_the_answer_does_not_keep_its_connection(
    served: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "_CONNECTION_SECONDS", 0.2)
    with connect(served) as slow:
        slow.sendall(b"GET / HTTP/1.0\r\n\r\n")
        wait_for(lambda: not accepts(slow, b"G"))


def test_connections_beyond_the_limit_are_closed_and_others_are_answered_again_later(
    served: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "_MAX_CONNECTIONS", 2)
    with connect(served), connect(served), connect(served) as third:
        assert third.recv(1) == b""
    wait_for(lambda: is_healthy(served))
