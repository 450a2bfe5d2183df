"""HTTP for people and for monitoring systems: the fleet page, /fleet.json, /metrics, /healthz, /readyz."""

import ipaddress
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import Any, TypeAlias
from urllib.parse import parse_qs

from prometheus_client import MetricsHandler

from basestation.devices.key_folder import KeyFolder
from basestation.monitoring.fleet_history import FleetHistory
from basestation.monitoring.fleet_page import read_page
from basestation.monitoring.fleet_report import fleet_report
from basestation.monitoring.metrics import Metrics
from common.host_header import host_name
from common.page_headers import PAGE_HEADERS
from protocol.errors import SettingsError

logger = logging.getLogger(__name__)

Check: TypeAlias = Callable[[], bool]

_FORMS = "HOST:PORT, like 127.0.0.1:9464, or PORT alone for loopback; port 0 chooses a free port"
_LOOPBACK = "127.0.0.1"
_ALLOWED_HOSTS = "an IP address, localhost, the HOST of --metrics-bind, this machine's name"
_CONNECTION_SECONDS = 30.0
"""From a connection to the end of its request's answer."""
_MAX_CONNECTIONS = 128
"""Those beyond are closed at once: each has a thread."""


class Monitor:
    """An HTTP server in its own thread.

    It answers requests for an address, ``localhost``, its own host or this machine's
    name: a web page that reaches it through a name of its own (DNS rebinding) is refused.

    Attributes:
        alive: whether the base station makes progress; /healthz reports it.
        ready: whether new sessions are accepted; /readyz reports it.

    Args:
        bind: ``HOST:PORT``, or ``PORT`` alone for loopback.
        metrics: served at /metrics; the fleet page shows their last minutes.
        keys: of the enrolled devices, which the fleet page lists.

    Raises:
        SettingsError: the address cannot be bound.
    """

    def __init__(self, bind: str, metrics: Metrics, keys: KeyFolder | None = None) -> None:
        self.alive: Check = lambda: True
        self.ready: Check = lambda: False
        self._metrics = metrics
        self._history = FleetHistory(metrics, keys)
        self._page = read_page()
        host, _, port = bind.rpartition(":")
        self._names = {"localhost", host.lower(), socket.gethostname().lower()}
        try:
            self._server = _Server((host or _LOOPBACK, int(port)), self._handler())
        except (OSError, ValueError, OverflowError) as error:
            raise SettingsError("metrics-bind", bind, f"{_FORMS} ({error})") from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="monitor", daemon=True)
        self._history.start()
        self._thread.start()

    @property
    def url(self) -> str:
        """The base URL."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._history.close()

    def _allows(self, host: str | None) -> bool:
        """Whether a request may name a host; programs may leave it out, which browsers do not."""
        if host is None:
            return True
        name = host_name(host)
        return name is not None and (name in self._names or _is_address(name))

    def _fleet(self, query: str) -> bytes:
        device = parse_qs(query).get("device", [None])[0]
        report = fleet_report(self._history, self._metrics.fleet.faults, device)
        return json.dumps(report | {"alive": self.alive(), "ready": self.ready()}).encode()

    def _respond(self, path: str, query: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, content type and content of the answer to a request."""
        checks: dict[str, Check] = {"/healthz": lambda: self.alive(), "/readyz": lambda: self.alive() and self.ready()}
        if path == "/fleet.json":
            return HTTPStatus.OK, "application/json", self._fleet(query)
        if file := self._page.get(path):
            return HTTPStatus.OK, file.content_type, file.content
        status = HTTPStatus.NOT_FOUND
        if check := checks.get(path):
            status = HTTPStatus.OK if check() else HTTPStatus.SERVICE_UNAVAILABLE
        return status, "text/plain", status.phrase.encode() + b"\n"

    def _handler(self) -> type[MetricsHandler]:
        monitor = self

        class Handler(MetricsHandler):
            registry = monitor._metrics.registry

            def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
                path, _, query = self.path.partition("?")
                host = self.headers.get("Host")
                if not monitor._allows(host):
                    text = f"the Host is {host!r}; allowed: {_ALLOWED_HOSTS}\n"
                    self._answer(HTTPStatus.BAD_REQUEST, "text/plain", text.encode())
                elif path == "/metrics":
                    super().do_GET()
                else:
                    self._answer(*monitor._respond(path, query))

            def _answer(self, status: HTTPStatus, content_type: str, content: bytes) -> None:
                self.send_response(status)
                headers = {"Content-Type": content_type, "Content-Length": str(len(content)), **PAGE_HEADERS}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        return Handler


class _Server(ThreadingHTTPServer):
    """A thread for each of a limited number of connections, for a limited time; a client that leaves is no error."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[MetricsHandler]) -> None:
        self._deadlines: dict[socket.socket, float] = {}
        super().__init__(address, handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return len(self._deadlines) < _MAX_CONNECTIONS

    def process_request(self, request: Any, client_address: Any) -> None:
        self._deadlines[request] = time.monotonic() + _CONNECTION_SECONDS
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._deadlines.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End the connections whose time is over; ``serve_forever`` calls it twice a second."""
        now = time.monotonic()
        for request, deadline in list(self._deadlines.items()):
            if deadline < now:
                with suppress(OSError):  # it has just ended
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            logger.exception("a request of %s failed", client_address)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
