"""The chat page: the files of ``page/``, which a browser may show but which may load nothing from elsewhere."""

from pathlib import Path

from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

PAGE_PATH, FILES_PATH = "/", "/page/"
_FOLDER = Path(__file__).parent / "page"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[BaseRoute]:
    """The page at ``/``, and its style and scripts under ``/page/``."""
    return [Route(PAGE_PATH, _index), Mount(FILES_PATH, _Files(directory=_FOLDER))]


def is_page(path: str) -> bool:
    """Whether a path belongs to the page, which is the same for everybody and needs no API key."""
    return path == PAGE_PATH or path.startswith(FILES_PATH)


async def _index(_: object) -> Response:
    return FileResponse(_FOLDER / "index.html", headers=_HEADERS)


class _Files(StaticFiles):
    """Static files with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Answer a request for a file."""
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response
