"""A connection greets an idle base station, and is made anew after a loss."""

import logging
from dataclasses import dataclass, field
from typing import cast

import pytest

from device.link.connection import GREETING_INTERVAL, RETRY_INTERVAL, Connection
from device.session.client import Client
from protocol.errors import AdmissionError, LinkError


@dataclass
class FakeClient:
    """Counts its greetings; raises ``network.error`` instead where it is set."""

    network: "FakeNetwork"
    greetings: int = 0
    closed: bool = False
    is_greeted: bool = True
    bridges_outages: bool = False

    def greet(self, timeout: float) -> None:
        assert 0 < timeout <= GREETING_INTERVAL
        self.network.check()
        self.greetings += 1

    def close(self) -> None:
        assert not self.closed
        self.closed = True


@dataclass
class FakeNetwork:
    """Makes clients, with a clock that the test sets."""

    now: float = 1000.0
    error: LinkError | AdmissionError | None = None
    clients: list[FakeClient] = field(default_factory=list)

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def connect(self) -> Client:
        self.check()
        self.clients.append(FakeClient(self))
        return cast(Client, self.clients[-1])

    def connection(self) -> Connection:
        return Connection(self.connect, lambda: self.now)

    def greetings(self) -> list[int]:
        """Greetings over each link so far, without the one that opens it."""
        return [client.greetings for client in self.clients]


@pytest.fixture
def network(caplog: pytest.LogCaptureFixture) -> FakeNetwork:
    caplog.set_level(logging.INFO, logger="device.link.connection")
    return FakeNetwork()


def test_connection_is_made_at_the_first_use(network: FakeNetwork) -> None:
    connection = network.connection()
    assert (network.clients, connection.alive) == ([], False)
    client = connection.client()
    assert client is cast(Client, network.clients[0])
    assert connection.alive


def test_busy_base_station_is_not_greeted(network: FakeNetwork) -> None:
    connection = network.connection()
    first = connection.client()
    for _ in range(10):
        network.now += 1.5
        connection.mark_received()
        network.now += 1.5
        assert connection.client() is first
    assert network.greetings() == [0]


def test_idle_base_station_is_greeted_before_its_client_is_used(network: FakeNetwork) -> None:
    connection = network.connection()
    first = connection.client()
    network.now += 2.0
    assert connection.client() is first
    assert connection.client() is first
    assert network.greetings() == [1]


def test_keep_alive_greets_in_each_interval(network: FakeNetwork) -> None:
    connection = network.connection()
    assert connection.keep_alive() == GREETING_INTERVAL
    for _ in range(3):
        network.now += GREETING_INTERVAL
        assert connection.alive
        assert connection.keep_alive() == GREETING_INTERVAL
    assert network.greetings() == [3]


def test_connection_without_a_recent_reply_is_not_alive(network: FakeNetwork) -> None:
    connection = network.connection()
    connection.client()
    alive = []
    for seconds in (GREETING_INTERVAL + 4.9, 0.2):
        network.now += seconds
        alive.append(connection.alive)
    connection.mark_received()
    assert [*alive, connection.alive] == [True, False, True]


def test_connection_is_made_anew_after_a_loss(network: FakeNetwork) -> None:
    connection = network.connection()
    first = connection.client()
    connection.lose(LinkError("no answer"))
    assert network.clients[0].closed
    assert not connection.alive
    assert connection.client() is not first
    assert [client.closed for client in network.clients] == [True, False]


@pytest.mark.parametrize("error", [LinkError("no answer"), AdmissionError("unknown key")])
def test_failed_greeting_raises_and_drops_the_client(network: FakeNetwork, error: LinkError | AdmissionError) -> None:
    connection = network.connection()
    connection.client()
    network.now, network.error = network.now + 5, error
    with pytest.raises(type(error)):
        connection.client()
    assert network.clients[0].closed
    assert connection.keep_alive() == RETRY_INTERVAL
    network.error = None
    assert connection.keep_alive() == GREETING_INTERVAL
    assert len(network.clients) == 2


def test_only_the_first_error_of_an_outage_is_logged(network: FakeNetwork, caplog: pytest.LogCaptureFixture) -> None:
    connection = network.connection()
    for outage in ("first outage", "second outage"):
        network.error = LinkError(outage)
        for _ in range(3):
            assert connection.keep_alive() == RETRY_INTERVAL
            network.now += RETRY_INTERVAL
        network.error = None
        for _ in range(2):
            assert connection.keep_alive() == GREETING_INTERVAL
            network.now += GREETING_INTERVAL
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "first outage"),
        ("INFO", "the base station answers again"),
        ("WARNING", "second outage"),
        ("INFO", "the base station answers again"),
    ]


def test_closed_connection_is_closed_once(network: FakeNetwork) -> None:
    connection = network.connection()
    connection.client()
    connection.close()
    connection.close()
    assert network.clients[0].closed
    assert not connection.alive
