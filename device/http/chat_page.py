"""The chat page: the files of ``page/``, which a browser may show but which may load nothing from elsewhere."""

from pathlib import Path

from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from common.page_headers import PAGE_HEADERS

PAGE_PATH, FILES_PATH = "/", "/page/"
_FOLDER = Path(__file__).parent / "page"


def page_routes() -> list[BaseRoute]:
    """The page at ``/``, and its style and scripts under ``/page/``."""
    return [Route(PAGE_PATH, _index), Mount(FILES_PATH, _Files(directory=_FOLDER))]


def is_page(path: str) -> bool:
    """Whether a path belongs to the page, which is the same for everybody and needs no API key."""
    return path == PAGE_PATH or path.startswith(FILES_PATH)


async def _index(_: object) -> Response:
    return FileResponse(_FOLDER / "index.html", headers=PAGE_HEADERS)


class _Files(StaticFiles):
    """Static files with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Answer a request for a file."""
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response
