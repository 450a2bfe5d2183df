"""The socket of the device's HTTP service, from the first connection to SIGTERM."""

import logging
import signal
import socket
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp

from common.loopback import is_loopback
from device.answers.worker import Worker
from device.http.answer_fields import Defaults
from device.http.api_key import VARIABLE
from device.http.http_connection import HttpConnection
from device.http.service import Access, application
from protocol.errors import LinkError, SettingsError

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 2
_STOP_SECONDS = 1.0
_EXAMPLE = "http://127.0.0.1:8080"
_UVICORN: dict[str, Any] = {
    "loop": "asyncio",
    "http": HttpConnection,
    "ws": "none",
    "lifespan": "off",
    "log_config": None,
    "log_level": "warning",
    "access_log": False,
    "proxy_headers": False,
    "timeout_graceful_shutdown": _GRACE_SECONDS,
}
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def check_bind(bind: str, api_key: str | None) -> None:
    """Refuse a malformed address, and one that other machines can reach unless there is an API key.

    Raises:
        SettingsError: the address is refused.
    """
    parts = urlsplit(bind)
    try:
        complete = parts.scheme == "http" and parts.hostname and parts.port is not None
    except ValueError:
        complete = False
    if not complete:
        raise SettingsError("bind", bind, _EXAMPLE)
    if api_key is None and not is_loopback(bind):
        raise SettingsError(
            "bind", bind, f"{_EXAMPLE}; to serve other machines, pass --api-key-file FILE or set {VARIABLE}"
        )


def check_free(bind: str) -> None:
    """Refuse an address that cannot be bound, before a model is loaded for it.

    Raises:
        LinkError: it cannot.
    """
    _listen(bind).close()


def serve(
    worker: Worker, name: str, defaults: Defaults, bind: str, api_key: str | None, origins: Collection[str] = ()
) -> None:
    """Serve until interrupted; port 0 in ``bind`` selects a free one.

    Args:
        worker: answers the requests; it is started and stopped here.
        name: of the model.
        defaults: for fields that a request leaves out.
        bind: ``http://HOST:PORT``.
        api_key: that requests must send; None serves loopback without one.
        origins: of the web pages that may send requests.

    Raises:
        SettingsError: other machines can reach the address, and there is no API key.
        LinkError: the address cannot be bound.
    """
    check_bind(bind, api_key)
    listening = _listen(bind)
    host, port = listening.getsockname()[:2]
    access = Access(api_key, {*_LOOPBACK_NAMES, host} if is_loopback(bind) else None, origins)
    server = HttpServer(worker, application(worker, name, defaults, access))

    def stop(*_: object) -> None:
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)  # until uvicorn handles them, and when it raises them again at its end
    worker.start(on_failure=stop)
    logger.info("serving %s at http://%s:%d", name, f"[{host}]" if ":" in host else host, port)
    try:
        server.run([listening])
    finally:
        worker.stop(_STOP_SECONDS)
    if worker.failure is not None:
        raise worker.failure
    logger.info("stopped")


class HttpServer(uvicorn.Server):
    """uvicorn's server; to stop, it ends the answers before it waits for the connections to close.

    Args:
        worker: gives the answers.
        app: the service.
    """

    def __init__(self, worker: Worker, app: ASGIApp) -> None:
        super().__init__(uvicorn.Config(app, **_UVICORN))
        self._worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop serving."""
        self._worker.close()
        await super().shutdown(sockets)


def _listen(bind: str) -> socket.socket:
    parts = urlsplit(bind)
    assert parts.hostname is not None
    family = socket.AF_INET6 if ":" in parts.hostname else socket.AF_INET
    try:
        return socket.create_server((parts.hostname, parts.port or 0), family=family)
    except (OSError, TypeError, UnicodeError) as error:  # a name that is not text raises TypeError
        reason = getattr(error, "strerror", None) or error
        raise LinkError(f"cannot bind {bind!r}: {reason}; name a free address like {_EXAMPLE}") from error
