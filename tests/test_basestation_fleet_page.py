"""The fleet page in a browser: what an operator sees, by mouse, keyboard and screen reader, light, dark and small."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from protocol.messages import Fault
from tests.browser import PHONE, visit
from tests.fleet import Fleet, fleet
from tests.sample_fleet import SampleFleet, sample_fleet

pytestmark = pytest.mark.pages

HOSTILE = "<img src=//x.test/ onerror=alert(1)>"
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": PHONE,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SampleFleet]:
    """A real base station, and a device that has answered a request."""
    with sample_fleet(tmp_path_factory.mktemp("fleet")) as pair:
        assert pair.ask() == 200
        yield pair


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path) as running:
        yield running


def row(page: Page, name: str) -> list[str]:
    """The texts of a device's row; waits for it."""
    line = page.locator("#devices tr").filter(has=page.get_by_role("link", name=name, exact=True))
    line.wait_for()
    return [text.strip() for text in line.locator("th, td").all_inner_texts()]


@pytest.mark.parametrize("look", LOOKS)
def test_devices_appear_by_name_with_their_figures(browser: Browser, pair: SampleFleet, look: str) -> None:
    with visit(browser, f"{pair.station.metrics_url}/#device=kitchen", **LOOKS[look]) as opened:
        page = opened.page
        expect(page.locator("#status")).to_have_text("Serving")
        assert row(page, "garden")[1] == "none yet"
        assert pair.ask() == 200
        figures = page.locator("#detail .chart", has_text="Tokens per second").locator("strong")
        expect(figures).to_have_text(re.compile("[1-9]"), timeout=30_000)
        _, seen, *_, faults = row(page, "kitchen")
        assert (seen.endswith("s ago"), faults) == (True, "0")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert opened.serious_violations() == []
        assert (opened.errors, opened.foreign) == ([], [])


def test_a_page_that_is_opened_later_shows_the_minutes_before(browser: Browser, pair: SampleFleet) -> None:
    minutes = re.compile("L.*L")  # a line through three points
    for is_first in (True, False):
        with visit(browser, pair.station.metrics_url) as opened:
            line = opened.page.locator("#station .chart", has_text="Tokens per second").locator("path.stroke-0")
            line.first.wait_for(state="attached")
            if is_first:  # the base station has just started
                expect(line.first).to_have_attribute("d", minutes, timeout=30_000)
            assert minutes.search(line.first.get_attribute("d") or "")


def test_names_and_texts_of_devices_are_shown_as_text(browser: Browser, running: Fleet) -> None:
    running.enroll("kitchen", shown=HOSTILE)
    running.session("kitchen")
    running.links["kitchen"].send(Fault(None, HOSTILE, f"{HOSTILE}<script>alert(2)</script>"))
    with visit(browser, running.monitor.url) as opened:
        page = opened.page
        page.locator("#devices").get_by_role("link", name=HOSTILE, exact=True).click()
        expect(page.locator("#detail-title")).to_have_text(HOSTILE)
        expect(page.locator("#faults .message")).to_have_text(f"{HOSTILE}<script>alert(2)</script>")
        expect(page.locator("#faults")).to_contain_text(f"{HOSTILE} reported by {HOSTILE}")
        assert page.locator("body img, body script").count() == 0
        assert opened.serious_violations() == []
        assert (opened.errors, opened.foreign) == ([], [])


def test_a_device_is_opened_and_closed_by_the_keyboard(browser: Browser, running: Fleet) -> None:
    for name in ("garden", "kitchen"):
        running.enroll(name)
    with visit(browser, running.monitor.url) as opened:
        page = opened.page
        row(page, "kitchen")
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent") == "kitchen":
                break
        page.keyboard.press("Enter")
        expect(page.locator("#detail-title")).to_be_focused()
        expect(page.get_by_role("link", name="kitchen", exact=True)).to_have_attribute("aria-current", "true")
        page.keyboard.press("Tab")
        expect(page.locator("#close")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#detail")).to_be_hidden()
        expect(page.get_by_role("link", name="kitchen", exact=True)).to_be_focused()


def test_focus_stays_on_a_device_while_the_figures_change(browser: Browser, running: Fleet) -> None:
    running.enroll("kitchen")
    with visit(browser, running.monitor.url) as opened:
        link = opened.page.get_by_role("link", name="kitchen", exact=True)
        link.focus()
        with opened.page.expect_response("**/fleet.json"):
            pass
        running.enroll("garden")
        row(opened.page, "garden")
        expect(link).to_be_focused()


def test_a_base_station_that_stops_answering_is_not_shown_as_serving(browser: Browser, running: Fleet) -> None:
    with visit(browser, running.monitor.url) as opened:
        status = opened.page.locator("#status")
        expect(status).to_have_text("Serving")
        running.server.stop(drain_seconds=60)
        expect(status).to_have_text("Not ready: loading its model, or draining")
        running.monitor.close()
        expect(status).to_contain_text("The base station does not answer; figures of")


def test_a_folder_that_cannot_be_read_is_told(browser: Browser, running: Fleet) -> None:
    with visit(browser, running.monitor.url) as opened:
        (running.path / "keys" / "devices").rmdir()
        expect(opened.page.locator("#unreadable")).to_contain_text("cannot be read")
