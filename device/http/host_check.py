"""Which names the service may be called by, so that a web page cannot reach it through a name of its own."""

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from common.host_header import host_name
from device.http.http_errors import HttpError, shown


class HostCheck:
    """Refuses requests whose Host is another name (DNS rebinding).

    Args:
        app: the service.
        hosts: names without ports; None allows every name.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with status 400, or pass it on."""
        host = Headers(scope=scope).get("host", "")
        if self._hosts is None or host_name(host) in self._hosts:
            await self._app(scope, receive, send)
        else:
            error = HttpError(400, f"the Host is {shown(host)}; allowed: {', '.join(sorted(self._hosts))}", "host")
            await error.response()(scope, receive, send)
