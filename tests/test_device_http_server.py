"""The HTTP service on a real socket: limits of its connections, and its end during an answer."""

import json
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx2
import pytest

from device.answers.worker import Worker
from device.http.http_connection import HttpConnection
from device.http.http_server import HttpServer, serve
from device.http.service import Access, application
from tests.fakes import PROMPT, FakeDraftModel
from tests.number_service import DEFAULTS, FIELDS, NumberTokenizer, new_station, new_worker
from tests.wait import wait_for

SECONDS = 20
REQUEST = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"


@contextmanager
def running(worker: Worker, send_bytes: int | None = None) -> Iterator[tuple[HttpServer, int]]:
    server = HttpServer(worker, application(worker, "numbers", DEFAULTS, Access()))
    listening = socket.create_server(("127.0.0.1", 0))
    if send_bytes:  # of connections, which inherit it
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listening],))
    worker.start()
    thread.start()
    try:
        yield server, port
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        worker.stop(SECONDS)
        assert not thread.is_alive()


@pytest.fixture
def port() -> Iterator[int]:
    with running(new_worker(new_station())) as (_, port):
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), SECONDS)


def rest_of(connection: socket.socket) -> bytes:
    """All bytes until the service closes the connection."""
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def status_and_error(received: bytes) -> tuple[int, dict[str, object]]:
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/chat/compl", REQUEST[:-2], POST, POST + b'{"messages"'], ids=lambda sent: str(sent[-20:])
)
def test_a_request_that_does_not_arrive_in_time_is_refused(
    sent: bytes, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HttpConnection, "request_seconds", 0.2)
    with connect(port) as connection:
        connection.sendall(sent)
        status, error = status_and_error(rest_of(connection))
    assert (status, error["type"]) == (408, "invalid_request_error")


def test_single_bytes_do_not_extend_the_time_of_a_request(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpConnection, "request_seconds", 0.2)
    with connect(port) as connection:
        connection.settimeout(0.02)
        received = b""
        for _ in range(1000):
            try:
                connection.sendall(b"x")
                received = connection.recv(65536)
                break
            except TimeoutError:
                continue
    assert received.startswith(b"HTTP/1.1 408")


def test_a_second_request_of_a_connection_has_a_time_of_its_own(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(port) as connection:
        connection.sendall(REQUEST)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(HttpConnection, "request_seconds", 0.2)
        connection.sendall(REQUEST[:-2])
        assert b"HTTP/1.1 408" in rest_of(connection)


def test_a_request_behind_another_has_a_time_of_its_own(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpConnection, "request_seconds", 0.2)
    with connect(port) as connection:
        connection.sendall(REQUEST + POST)
        received = rest_of(connection)
    assert received.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in received


def test_an_answer_may_take_longer_than_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpConnection, "request_seconds", 0.2)
    slow_down(monkeypatch, lambda count: threading.Event().wait(0.5) if count == 2 else None)
    with running(new_worker(new_station())) as (_, port):
        assert httpx2.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=FIELDS, timeout=SECONDS).is_success


@pytest.mark.parametrize(
    "sent",
    [REQUEST.replace(b"/v1/models", b"/metrics") * 100, REQUEST.replace(b"/v1/models", b"/openapi.json")],
    ids=["the next answer waits", "the connection is to be closed"],
)
def test_a_client_that_does_not_read_loses_its_connection(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpConnection, "response_seconds", 0.2)
    with running(new_worker(new_station()), send_bytes=4096) as (server, port), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(sent)
        wait_for(lambda: server.server_state.total_requests > 0)
        wait_for(lambda: not server.server_state.connections)


def test_connections_beyond_the_limit_are_refused_and_others_served(port: int) -> None:
    with ExitStack() as idle:
        for _ in range(HttpConnection.max_connections):
            first = idle.enter_context(connect(port))
        with connect(port) as refused:
            status, error = status_and_error(rest_of(refused))
        assert (status, error["code"]) == (503, "busy")
        first.sendall(REQUEST)
        assert first.recv(65536).startswith(b"HTTP/1.1 200")
    with connect(port) as served:
        served.sendall(REQUEST)
        assert served.recv(65536).startswith(b"HTTP/1.1 200")


def test_what_is_not_http_is_refused_as_json(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"hello\r\n\r\n")
        status, error = status_and_error(rest_of(connection))
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_a_body_that_is_too_long_is_refused_before_it_has_arrived(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(POST.replace(b"100", b"9000000") + b" " * 5_000_000)
        received = connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 413")


def slow_down(monkeypatch: pytest.MonkeyPatch, before_pass: Callable[[int], object]) -> None:
    """Call ``before_pass`` with the number of the draft model's forward pass."""
    forward = FakeDraftModel.forward

    def watched(model: FakeDraftModel, token_ids: list[int]) -> object:
        before_pass(len(model.passes))
        return forward(model, token_ids)

    monkeypatch.setattr(FakeDraftModel, "forward", watched)


@contextmanager
def stopped_during_an_answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A service that is told to stop while an answer is under way."""
    answering, stopping = threading.Event(), threading.Event()

    def wait_for_the_stop(count: int) -> None:
        if count == 8:
            answering.set()
            assert stopping.wait(SECONDS)

    slow_down(monkeypatch, wait_for_the_stop)
    worker = new_worker(new_station())
    close = worker.close

    def close_and_go_on() -> None:
        close()
        stopping.set()

    monkeypatch.setattr(worker, "close", close_and_go_on)
    with running(worker) as (server, port):

        def stop() -> None:
            assert answering.wait(SECONDS)
            server.should_exit = True

        stopper = threading.Thread(target=stop)
        stopper.start()
        yield port
        stopper.join()


def test_a_stream_ends_with_an_error_when_the_service_stops(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with stopped_during_an_answer(monkeypatch) as port:
        fields = FIELDS | {"stream": True, "max_tokens": 2000}
        response = httpx2.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=fields, timeout=SECONDS)
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert len(events) > 2
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert (response.status_code, error["type"], error["code"]) == (200, "server_error", "closing")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_request_that_cannot_be_interrupted_is_503_when_the_service_stops(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoding, released = threading.Event(), threading.Event()

    def wait(*_: object) -> list[int]:
        encoding.set()
        released.wait(SECONDS)
        return PROMPT

    monkeypatch.setattr(NumberTokenizer, "encode_chat", wait)
    with running(new_worker(new_station())) as (server, port):

        def stop() -> None:
            assert encoding.wait(SECONDS)
            server.should_exit = True

        stopper = threading.Thread(target=stop)
        stopper.start()
        response = httpx2.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=FIELDS, timeout=SECONDS)
        released.set()
        stopper.join()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "closing")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_whole_answer_is_503_when_the_service_stops(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with stopped_during_an_answer(monkeypatch) as port:
        fields = FIELDS | {"max_tokens": 2000}
        response = httpx2.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=fields, timeout=SECONDS)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "closing")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_signal_that_comes_before_the_server_runs_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = new_worker(new_station())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    start, was_ignored = worker.start, threading.Event()

    def start_and_signal(on_failure: Callable[[], None]) -> None:
        start(on_failure)
        signal.raise_signal(signal.SIGTERM)

    def signal_again() -> None:
        was_ignored.set()
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(worker, "start", start_and_signal)
    again = threading.Timer(SECONDS, signal_again)
    again.start()
    try:
        serve(worker, "numbers", DEFAULTS, "http://127.0.0.1:0", None)
    finally:
        again.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert not was_ignored.is_set()
