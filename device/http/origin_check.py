"""Which web pages may send requests: a browser sends them on behalf of any page that its user opens."""

import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from device.http.chat_page import PAGE_PATH
from device.http.http_errors import HttpError, shown
from protocol.errors import SettingsError

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def check_origins(origins: Collection[str]) -> None:
    """Refuse origins that no browser sends.

    Raises:
        SettingsError: there is one.
    """
    for origin in origins:
        port = _DEFAULT_PORTS.get(origin.partition("://")[0])
        if not _ORIGIN.fullmatch(origin) or (port and origin.endswith(port)):
            allowed = "https://HOST or https://HOST:PORT in lower case, without a path or the default port"
            raise SettingsError("cors-origin", origin, allowed)


class OriginCheck:
    """Refuses requests of web pages, except those of the service itself and of the origins that are allowed.

    A link on any page may open the chat page, which cannot be framed.

    Programs send neither an Origin nor Sec-Fetch-Site, and pass.

    Args:
        app: the service.
        origins: ``http://HOST:PORT`` of the pages that may send requests.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with status 403, or pass it on."""
        if scope["type"] == "http" and (refused := self._refused(scope)):
            message = f"a web page of {shown(refused)} may not send requests; allow it with: --cors-origin ORIGIN"
            await HttpError(403, message, "origin").response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refused(self, scope: Scope) -> str | None:
        """The foreign origin of a request, if it has one."""
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin in self._origins:
            return None
        if origin is not None:
            return None if origin.partition("://")[2] == headers.get("host") else origin
        opens_page = headers.get("sec-fetch-dest") == "document" and scope["path"] == PAGE_PATH  # by a link
        return "another site" if headers.get("sec-fetch-site") == "cross-site" and not opens_page else None
