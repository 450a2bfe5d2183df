"""The chat page in a browser, with the sample pair: what it shows is what the service reports."""

import json
import shlex
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from bench.setup.station_process import running_station
from tests.browser import PHONE, visit
from tests.device_service import device_service
from tests.record_file import lines_of
from tests.sample import SAMPLE

pytestmark = [pytest.mark.model, pytest.mark.pages]

LONG_ANSWER = 2000
ANSWERS = "**/v1/chat/completions"
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b> & 'quotes'"
QUESTION = "Why is the sky blue?"


@dataclass(frozen=True)
class Pair:
    """A base station and a device's service; ``wire`` is the base station's record of rounds, ``rounds`` the device's.

    Both are read while they are written.
    """

    url: str
    wire: Path
    rounds: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("records")
    wire, rounds = folder / "station.jsonl", folder / "device.jsonl"
    with (
        running_station(str(SAMPLE), "float32", "--record", str(wire)) as address,
        device_service(address, "--max-new-tokens", "40", "--record", str(rounds)) as service,
    ):
        yield Pair(service.url, wire, rounds)


@contextmanager
def page_of(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The page, which must work without an error and without another host."""
    with visit(browser, url, **options) as opened:
        yield opened.page
        assert (opened.errors, opened.foreign) == ([], [])


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def await_answer(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("Answer complete")


def tokens_shown(page: Page) -> list[tuple[str, str]]:
    """Text and origin of the last answer's tokens."""
    spans = page.locator("article.answer").last.locator(".token")
    found: list[list[str]] = spans.evaluate_all("all => all.map(one => [one.textContent, one.dataset.origin])")
    return [(text, origin) for text, origin in found]


def reported(body: str) -> list[dict[str, Any]]:
    """The rounds of a stream."""
    chunks = [json.loads(event.removeprefix("data: ")) for event in body.split("\n\n") if event.startswith("data: {")]
    return [chunk["edgedraft"] for chunk in chunks if "edgedraft" in chunk]


def answer_with(page: Page, *tokens: tuple[str, str], unverified: str = "") -> None:
    """Let the service answer the next requests with a round, of tokens with these texts and origins, and this text."""
    listed = [{"text": text, "token_id": 1, "origin": origin, "margin": None} for text, origin in tokens]
    record = {"round": 1, "mode": "ids", "draft_len": 8, "drafted": len(tokens), "accepted": len(tokens) - 1}
    times = {"draft_seconds": 0.1, "reply_seconds": 0.1, "uplink_bytes": 40}
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {}, "finish_reason": None}], "edgedraft": {**record, **times, "tokens": listed}},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    ]
    if unverified:
        revision = {"replaced": 0, "unverified": len(unverified)}
        chunks.insert(1, {"choices": [{"delta": {"content": unverified}}], "edgedraft": revision})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"

    def fulfill(route: Route) -> None:
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route(ANSWERS, fulfill)


def ask_for_a_long_answer(route: Route) -> None:
    long = {"max_tokens": LONG_ANSWER, "ignore_eos": True}
    route.continue_(post_data=json.dumps(json.loads(route.request.post_data or "") | long))


def test_an_answer_appears_with_the_origins_and_figures_that_the_service_reports(browser: Browser, pair: Pair) -> None:
    with page_of(browser, pair.url) as page, page.expect_response(ANSWERS) as response:
        ask(page, QUESTION)
        await_answer(page)
        rounds = reported(response.value.text())
        tokens = [token for one in rounds for token in one["tokens"]]
        assert tokens_shown(page) == [(token["text"], token["origin"]) for token in tokens]
        assert len({token["origin"] for token in tokens}) > 1
        drafted, accepted = (sum(one[name] for one in rounds) for name in ("drafted", "accepted"))
        uplink = sum(one["uplink_bytes"] for one in rounds)
        figures = {"acceptance": accepted / drafted, "tokensPerRound": len(tokens) / len(rounds)}
        for name, value in (figures | {"uplink": uplink / len(tokens)}).items():
            shown = page.locator(f"[data-figure={name}]").inner_text().removesuffix(" B")
            assert float(shown) == pytest.approx(value, abs=0.051)
        full = 2 * 49152 * drafted / len(tokens) / 1000
        assert page.locator("[data-figure=fullVocabulary]").inner_text().endswith(f"full vocabulary {full:.0f} kB")
        expect(page.locator("#chart svg")).to_have_attribute(
            "aria-label",
            f"Last {len(rounds)} rounds: {drafted} tokens drafted, {accepted} accepted; "
            f"in {sum(not one['drafted'] for one in rounds)} the target decoded alone",
        )


def test_each_origin_has_a_tint_of_its_own_and_later_ones_get_one(browser: Browser, pair: Pair) -> None:
    origins = ["accepted", "recovered", "bonus", "target", "lookup", "grammar"]
    for scheme in ("light", "dark"):
        with page_of(browser, pair.url, color_scheme=scheme) as page:
            answer_with(page, *((f"{origin} ", origin) for origin in origins))
            ask(page, QUESTION)
            await_answer(page)
            tints = page.locator("article.answer .token").evaluate_all(
                "all => all.map(one => getComputedStyle(one).backgroundColor)"
            )
            assert len({*tints, "rgba(0, 0, 0, 0)"}) == len(origins) + 1
            legend = page.locator("#legend li").all_inner_texts()
            assert legend == ["accepted draft", "recovered", "bonus", "target alone", "prompt lookup", "grammar"]


def test_speculation_off_lets_the_target_decode_alone_on_the_wire(browser: Browser, pair: Pair) -> None:
    with page_of(browser, pair.url) as page:
        before = len(lines_of(pair.wire))
        page.get_by_role("switch", name="Speculation").click()
        ask(page, QUESTION)
        await_answer(page)
        alone = lines_of(pair.wire)[before:]
        assert {line["mode"] for line in alone} == {"target"}
        assert {origin for _, origin in tokens_shown(page)} == {"target"}
        page.get_by_role("switch", name="Speculation").click()
        page.get_by_label("Draft length").select_option("3")
        page.get_by_label("Mode").select_option("topk")
        page.get_by_label("Temperature").fill("0.7")
        ask(page, "Tell me more.")
        await_answer(page)
        drafted = lines_of(pair.wire)[before + len(alone) :]
        assert {line["mode"] for line in drafted} == {"topk"}
        assert max(line["drafted"] for line in drafted) == 3


@pytest.mark.parametrize("speculation", [True, False])
def test_stop_ends_the_answer_at_the_page_and_at_the_base_station(
    browser: Browser, pair: Pair, speculation: bool
) -> None:
    with page_of(browser, pair.url) as page:
        page.get_by_label("Draft length").select_option("2")
        page.get_by_role("switch", name="Speculation").set_checked(speculation)
        page.route(ANSWERS, ask_for_a_long_answer)
        before = len(lines_of(pair.wire))
        ask(page, "Count from one to a hundred.")
        expect(page.locator("article.answer .token").nth(2)).to_be_attached()
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        stopped = page.locator("article.answer").first.inner_text()
        page.unroute(ANSWERS)
        ask(page, QUESTION)
        await_answer(page)
        assert page.locator("article.answer").first.inner_text() == stopped
        assert sum(line["accepted"] + 1 for line in lines_of(pair.wire)[before:]) < LONG_ANSWER / 2


def test_an_answer_that_is_html_or_a_script_shows_as_text(browser: Browser, pair: Pair) -> None:
    with page_of(browser, pair.url) as page:
        page.on("dialog", lambda _: pytest.fail("a script ran"))
        answer_with(page, (HOSTILE, "accepted"), ("!", HOSTILE))
        ask(page, HOSTILE)
        await_answer(page)
        assert page.locator("article.question .body").inner_text() == HOSTILE
        assert page.locator("article.answer .body").inner_text() == f"{HOSTILE}!"
        page.locator("article.answer .token").first.hover()
        expect(page.locator("#details")).to_contain_text("<script>alert(2)</script>")
        assert page.locator("article img, article script, article b, #legend img, #details b").count() == 0


def test_characters_of_several_tokens_are_whole(browser: Browser, pair: Pair) -> None:
    with page_of(browser, pair.url) as page, page.expect_response(ANSWERS) as response:
        ask(page, "Write <b>bold</b> and 'quotes'. Count to ten with emoji 🙂.")
        await_answer(page)
        tokens = [token for one in reported(response.value.text()) for token in one["tokens"]]
        assert page.locator("article.answer .body").inner_text() == "".join(token["text"] for token in tokens)
        assert any(token["text"] == "" for token in tokens)
        assert "\ufffd" not in page.locator("article.answer .body").inner_text()


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"])
def test_nothing_serious_bars_anybody_from_the_page(browser: Browser, pair: Pair, options: dict[str, Any]) -> None:
    with visit(browser, pair.url, reduced_motion="reduce", **options) as opened:
        page = opened.page
        expect(page.locator("#model")).to_have_text("sample")
        assert opened.serious_violations() == []
        answer_with(page, *((f"{origin} ", origin) for origin in ("accepted", "recovered", "bonus", "target", "new")))
        ask(page, QUESTION)
        await_answer(page)
        page.get_by_text("As a table").click()
        page.get_by_role("button", name="Copy as curl").click()
        page.locator("article.answer .token").first.click()
        expect(page.locator("#details")).to_contain_text("accepted draft · round 1")
        assert opened.serious_violations() == []
        width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert width <= 0
        assert (
            page.locator("article.answer .token").first.evaluate("one => getComputedStyle(one).animationName") == "none"
        )
        assert opened.foreign == []


def test_a_keyboard_alone_asks_and_inspects_the_tokens(browser: Browser, pair: Pair) -> None:
    with page_of(browser, pair.url) as page:
        answer_with(page, ("One", "accepted"), (" two", "recovered"))
        page.keyboard.type(QUESTION)  # the message has the focus
        page.keyboard.press("Enter")
        await_answer(page)
        page.keyboard.press("Shift+Tab")
        details = page.locator("#details")
        page.keyboard.press("ArrowRight")
        expect(details).to_have_text("“One” · accepted draft · round 1")
        page.keyboard.press("End")
        expect(details).to_have_text("“two” · recovered · round 1")
        page.keyboard.press("Escape")
        expect(details).to_be_empty()
        for name in ("Message", "Send", "As a table", "Speculation", "Draft length", "Mode", "Temperature"):
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            assert name in (focused.evaluate("one => (one.labels?.[0] ?? one).textContent") or ""), name


def test_the_margin_of_an_accepted_token_is_shown(browser: Browser, pair: Pair) -> None:
    with page_of(browser, pair.url) as page, page.expect_response(ANSWERS) as response:
        ask(page, "Name the planets.")
        await_answer(page)
        rounds = reported(response.value.text())
        one = next(one for one in rounds if one["accepted"] and one["tokens"][0]["text"].strip())
        index = sum(len(other["tokens"]) for other in rounds if other["round"] < one["round"])
        page.locator("article.answer .token").nth(index).hover()
        expect(page.locator("#details")).to_contain_text(
            f"round {one['round']} · margin {one['tokens'][0]['margin']:.2f}"
        )


def test_the_copied_command_is_the_request(browser: Browser, pair: Pair) -> None:
    with page_of(browser, pair.url) as page:
        page.get_by_label("Message").fill("Say 'hello', \"world\" & $HOME.")
        page.get_by_role("button", name="Copy as curl").click()
        words = shlex.split(page.get_by_label("The request as a curl command").input_value())
        assert words[:3] == ["curl", "--no-buffer", f"{pair.url}/v1/chat/completions"]
        request = urllib.request.Request(words[2], words[words.index("-d") + 1].encode())  # noqa: S310 - our service
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            lines = response.read().decode().split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        page.get_by_role("button", name="Send").click()
        await_answer(page)
        assert page.locator("article.answer .body").inner_text() == text


def test_the_page_asks_for_the_api_key(browser: Browser, station_address: str) -> None:
    with (
        device_service(station_address, "--max-new-tokens", "4", api_key="sk-page") as service,
        visit(browser, service.url) as opened,
    ):
        page = opened.page
        for key in ("sk-wrong", "sk-page"):
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Use key").click()
        expect(page.locator("#model")).to_have_text("sample")
        expect(page.get_by_label("API key")).to_be_hidden()
        ask(page, QUESTION)
        await_answer(page)
        page.get_by_role("button", name="Copy as curl").click()
        assert "sk-page" not in page.content()
        assert "$EDGEDRAFT_API_KEY" in page.get_by_label("The request as a curl command").input_value()
        assert all("401" in error for error in opened.errors)


def test_a_refused_request_says_why_and_keeps_the_message(browser: Browser, pair: Pair) -> None:
    with visit(browser, pair.url) as opened:
        text = "word " * 9000
        ask(opened.page, text)
        expect(opened.page.get_by_role("alert")).to_contain_text("the prompt is too long")
        assert opened.page.get_by_label("Message").input_value() == text.strip()
        assert opened.page.locator("article").count() == 0


def test_text_that_no_base_station_has_verified_is_shown_apart(browser: Browser, pair: Pair) -> None:
    with page_of(browser, pair.url) as page:
        answer_with(page, ("One", "accepted"), unverified=" two three")
        ask(page, QUESTION)
        await_answer(page)
        assert tokens_shown(page) == [("One", "accepted"), (" two three", "unverified")]
        assert page.locator("#legend li").all_inner_texts()[-1] == "unverified"
        page.locator("article.answer .token").last.click()
        expect(page.locator("#details")).to_have_text("“two three” · unverified")


def test_an_answer_without_a_base_station_is_shown(browser: Browser) -> None:
    with (
        device_service("tcp://127.0.0.1:9", "--offline", "--max-new-tokens", "4") as service,
        page_of(browser, service.url) as page,
    ):
        ask(page, QUESTION)
        await_answer(page)
        assert [origin for _, origin in tokens_shown(page)] == ["unverified"]
        assert page.locator("article.answer .body").inner_text().strip()
