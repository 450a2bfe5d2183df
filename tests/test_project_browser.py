"""What the browser tests rely on: errors, foreign requests and inaccessible elements are noticed."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser import visit

pytestmark = pytest.mark.pages

HEAD = '<!doctype html><html lang="en"><title>A page</title><link rel="icon" href="data:,">'


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A server of the files that a test writes."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_a_sound_page_has_nothing_to_report(browser: Browser, url: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(f"{HEAD}<main><h1>Hello</h1></main>")
    with visit(browser, url) as opened:
        assert (opened.errors, opened.foreign, opened.serious_violations()) == ([], [], [])


def test_errors_foreign_requests_and_inaccessible_elements_are_noticed(
    browser: Browser, url: str, tmp_path: Path
) -> None:
    body = '<main><h1>Hello</h1><input></main><img alt="" src="http://127.0.0.2:9/x.png"><script>missing()</script>'
    (tmp_path / "index.html").write_text(HEAD + body)
    with visit(browser, url) as opened:
        assert any("missing is not defined" in error for error in opened.errors)
        assert opened.foreign == ["http://127.0.0.2:9/x.png"]
        assert [line.partition(":")[0] for line in opened.serious_violations()] == ["label"]
