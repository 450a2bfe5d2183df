"""The API key of the HTTP service: whoever sends it may use the service."""

import hmac
import os
import stat
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from device.http.chat_page import is_page
from device.http.http_errors import HttpError
from protocol.errors import KeyFileError

VARIABLE = "EDGEDRAFT_API_KEY"
_OPEN_PATHS = ("/healthz", "/readyz", "/health", "/metrics")
_FORBIDDEN = stat.S_IRWXG | stat.S_IRWXO


def read_api_key(path: Path | None) -> str | None:
    """The key in a file, or else in the environment; None without either.

    Raises:
        KeyFileError: the key is not printable ASCII, the file cannot be read, or others can read it.
    """
    if path is None:
        key = os.environ.get(VARIABLE)
        return None if key is None else _checked(key, VARIABLE)
    try:
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise KeyFileError(
            f"--api-key-file must name a file that holds the key, and this one cannot be read: {reason}; "
            f"or set {VARIABLE}"
        ) from error
    if mode & _FORBIDDEN:
        raise KeyFileError(f"{str(path)!r} holds an API key and is readable by others; run: chmod 600 {path}")
    return _checked(text.strip(), str(path))


def _checked(key: str, source: str) -> str:
    if not key or not all("!" <= character <= "~" for character in key):
        raise KeyFileError(f"the API key of {source!r} is empty or not printable ASCII without spaces")
    return key


class ApiKeyCheck:
    """Refuses requests without the key; health, readiness, metrics and the chat page need none.

    Args:
        app: the service.
        api_key: the key.
    """

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._api_key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with status 401, or pass it on."""
        path = scope["path"]
        if path in _OPEN_PATHS or is_page(path) or self._is_key(Headers(scope=scope).get("authorization", "")):
            await self._app(scope, receive, send)
        else:
            message = "the API key is missing or wrong; send the header: Authorization: Bearer KEY"
            error = HttpError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            await error.response()(scope, receive, send)

    def _is_key(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._api_key)
