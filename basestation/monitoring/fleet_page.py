"""The files of the fleet page."""

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file of the page."""

    content_type: str
    content: bytes


def read_page() -> dict[str, PageFile]:
    """The files by the path that a browser requests; the page itself is ``/``."""
    files = {
        f"/page/{path.name}": PageFile(f"{_TYPES[path.suffix]}; charset=utf-8", path.read_bytes())
        for path in _FOLDER.iterdir()
    }
    return {"/": files.pop("/page/index.html"), **files}
