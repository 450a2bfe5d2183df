"""Take the pictures of the docs, with the sample pair: ``python -m tests.screenshots FOLDER``."""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect

from bench.setup.station_process import running_station
from tests.browser import PHONE, chromium, visit
from tests.device_service import device_service
from tests.sample import SAMPLE
from tests.sample_fleet import sample_fleet

WIDE: dict[str, Any] = {"viewport": {"width": 1180, "height": 680}, "device_scale_factor": 1.5}
QUESTION = "Explain in three sentences why the sky is blue."
API_KEY = "sk-screenshots"
_WAIT_MS = 300_000


def main(folder: Path) -> None:
    """Write the pictures into a folder."""
    with chromium() as browser, running_station(str(SAMPLE), "bfloat16") as address:
        with device_service(address) as service:
            take_chat(browser, service.url, folder)
        with device_service(address, api_key=API_KEY) as service:
            take_key_and_phone(browser, service.url, folder)
        take_fleet(browser, folder)


def take_chat(browser: Browser, url: str, folder: Path) -> None:
    """The page on one machine: with speculation and without."""
    with visit(browser, url, **WIDE) as opened:
        page = opened.page
        ask(page, QUESTION)
        page.locator("article.answer .token[data-origin=accepted]").nth(9).hover()
        take(page, folder / "chat.png")
    with visit(browser, url, color_scheme="dark", **WIDE) as opened:
        page = opened.page
        page.get_by_role("switch", name="Speculation").click()
        ask(page, QUESTION)
        take(page, folder / "speculation-off.png")


def take_key_and_phone(browser: Browser, url: str, folder: Path) -> None:
    """The page of a board or a server, on a phone: it asks for the key."""
    with visit(browser, url, **PHONE, device_scale_factor=1.5) as opened:
        page = opened.page
        expect(page.get_by_label("API key")).to_be_visible()
        take(page, folder / "api-key.png")
        page.get_by_label("API key").fill(API_KEY)
        page.get_by_role("button", name="Use key").click()
        expect(page.locator("#model")).not_to_be_empty()
        ask(page, QUESTION)
        take(page, folder / "phone.png")


def take_fleet(browser: Browser, folder: Path) -> None:
    """The fleet page after two minutes of requests with pauses."""
    with tempfile.TemporaryDirectory() as keys, sample_fleet(Path(keys)) as fleet:
        for pause in (1, 8, 3, 12, 2, 6, 10, 1, 7, 4):
            assert fleet.ask(QUESTION, max_tokens=60) == 200
            time.sleep(pause)
        fleet.fault()
        with visit(browser, f"{fleet.station.metrics_url}/#device=kitchen", **WIDE) as opened:
            expect(opened.page.locator("#faults li")).to_have_count(1)
            opened.page.screenshot(path=folder / "fleet.png", full_page=True, animations="disabled")


def ask(page: Page, text: str) -> None:
    """Ask, and wait for the whole answer."""
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#status")).to_contain_text("Answer complete", timeout=_WAIT_MS)


def take(page: Page, path: Path) -> None:
    """Write the visible part of the page."""
    page.screenshot(path=path, animations="disabled")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
