"""HTTP endpoints for a monitoring system: /metrics, /healthz, /readyz."""

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import TypeAlias

from prometheus_client import MetricsHandler

from basestation.metrics import Metrics
from protocol.errors import SettingsError

Check: TypeAlias = Callable[[], bool]

_FORMS = "HOST:PORT, like 127.0.0.1:9464; port 0 chooses a free port"


class Monitor:
    """An HTTP server in its own thread.

    Attributes:
        alive: whether the engine makes progress; /healthz reports it.
        ready: whether new sessions are accepted; /readyz reports it.

    Args:
        bind: ``HOST:PORT``.
        metrics: served at /metrics.

    Raises:
        SettingsError: the address cannot be bound.
    """

    def __init__(self, bind: str, metrics: Metrics) -> None:
        self.alive: Check = lambda: True
        self.ready: Check = lambda: False
        try:
            host, port = bind.rsplit(":", 1)
            self._server = ThreadingHTTPServer((host, int(port)), self._handler(metrics))
        except (OSError, ValueError, OverflowError) as error:
            raise SettingsError("metrics-bind", bind, f"{_FORMS} ({error})") from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="monitor", daemon=True)
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

    def _handler(self, metrics: Metrics) -> type[MetricsHandler]:
        checks: dict[str, Check] = {"/healthz": lambda: self.alive(), "/readyz": lambda: self.alive() and self.ready()}

        class Handler(MetricsHandler):
            registry = metrics.registry

            def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    super().do_GET()
                elif check := checks.get(path):
                    self._answer(HTTPStatus.OK if check() else HTTPStatus.SERVICE_UNAVAILABLE)
                else:
                    self._answer(HTTPStatus.NOT_FOUND)

            def _answer(self, status: HTTPStatus) -> None:
                text = status.phrase.encode() + b"\n"
                self.send_response(status)
                self.send_header("Content-Type", "text/plain")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        return Handler
