"""Pages in headless Chromium: what they write to the console, what they request, what axe-core finds."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
"""Context options of a small screen."""
_WAIT_MS = 60_000


@dataclass
class Visit:
    """A page that is open, and what it has done so far.

    Attributes:
        page: Playwright's page.
        errors: console messages of type error or warning, and exceptions that nobody caught.
        foreign: requests to other hosts.
    """

    page: Page
    origin: str
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def serious_violations(self) -> list[str]:
        """What axe-core finds serious or critical, one line for each element."""
        found = Axe().run(self.page).response["violations"]
        return [
            f"{violation['id']}: {node['html']}"
            for violation in found
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]

    def note_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def note_exception(self, error: Exception) -> None:
        self.errors.append(str(error))

    def note_request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and f"{parts.scheme}://{parts.netloc}" != self.origin:
            self.foreign.append(request.url)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium; its own sandbox does not run as root."""
    expect.set_options(timeout=_WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=os.geteuid() != 0)
        yield browser
        browser.close()


@contextmanager
def visit(browser: Browser, url: str, **context_options: Any) -> Iterator[Visit]:
    """Open a page in a context of its own, with Playwright's options: ``**PHONE``, ``color_scheme="dark"``."""
    parts = urlsplit(url)
    context = browser.new_context(**context_options)
    context.set_default_timeout(_WAIT_MS)
    opened = Visit(context.new_page(), f"{parts.scheme}://{parts.netloc}")
    opened.page.on("console", opened.note_console)
    opened.page.on("pageerror", opened.note_exception)
    context.on("request", opened.note_request)
    try:
        opened.page.goto(url)
        yield opened
    finally:
        context.close()
