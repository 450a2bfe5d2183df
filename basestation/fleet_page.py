"""The files of the fleet page, and the headers that keep a browser from loading anything else into it."""

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


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
