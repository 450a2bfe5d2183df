"""The device's HTTP service, with models without weights: answers, errors, a lost base station."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from device.http.origin_check import check_origins
from device.http.service import Access, application
from device.link.connection import Connection
from protocol.errors import LinkError, SettingsError
from protocol.messages import Message
from tests.fakes import PROMPT, target_alone
from tests.link_pair import RefusingTransport
from tests.number_service import (
    DEFAULTS,
    FIELDS,
    TARGET,
    NumberTokenizer,
    OpenCounter,
    complete,
    content_of,
    http_client,
    new_station,
    new_worker,
    next_turn,
    streamed,
    text_of,
)

USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 12,
    "total_tokens": 17,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def test_answer_equals_the_targets_greedy_output() -> None:
    with http_client(new_station()) as client:
        answer = complete(client).json()
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": text_of(target_alone(TARGET, PROMPT, 12)),
    }
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == USAGE


def test_stream_has_the_same_text_token_by_token() -> None:
    with http_client(new_station()) as client:
        chunks = streamed(client, stream_options={"include_usage": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert [delta.get("content", "") for delta in deltas[1:-1]] == [
        text_of([token_id]) for token_id in target_alone(TARGET, PROMPT, 12)
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 13 + ["length"]
    assert chunks[-1]["usage"] == USAGE
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_seed_repeats_an_answer_and_no_seed_varies_it() -> None:
    with http_client(new_station()) as client:
        texts = [
            complete(client, temperature=1.0, seed=seed).json()["choices"][0]["message"]["content"]
            for seed in (5, 5, 6, None, None)
        ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_stop_string_ends_the_answer() -> None:
    tokens = target_alone(TARGET, PROMPT, 12)
    stop = f"{tokens[4]} {tokens[5]}"
    with http_client(new_station()) as client:
        choice = complete(client, stop=stop).json()["choices"][0]
        chunks = streamed(client, stop=[stop])
    assert choice["message"]["content"] == text_of(tokens).partition(stop)[0]
    assert choice["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == choice["message"]["content"]


def test_conversation_continues_in_one_session() -> None:
    counter = OpenCounter()
    with http_client(new_station(), counter) as client:
        second = complete(client, messages=next_turn(complete(client)))
        prompt = [*PROMPT, *target_alone(TARGET, PROMPT, 12), 9, 2, 6]
        assert content_of(second) == text_of(target_alone(TARGET, prompt, 12))
        assert counter.opens == 1
        complete(client, temperature=1)
        assert counter.opens == 2


@pytest.mark.parametrize("changed", [{"seed": 6}, {"temperature": 0.5}, {"top_p": 0.8}], ids=str)
def test_a_turn_with_other_sampling_settings_continues_in_the_same_session(changed: dict[str, float]) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 5}
    counter = OpenCounter()
    with http_client(new_station(), counter) as client:
        messages = next_turn(complete(client, **fields))
        texts = [content_of(complete(client, messages=messages, **fields | change)) for change in ({}, changed)]
    assert counter.opens == 1
    assert texts[0] != texts[1]
    with http_client(new_station()) as client:
        assert texts[1] == content_of(complete(client, messages=messages, **fields | changed))


def test_error_response_is_one_line_and_the_next_request_is_answered() -> None:
    with http_client(new_station()) as client:
        for response, status in (
            (client.post("/v1/chat/completions", content=b"{"), 400),
            (client.post("/v1/chat/completions", content=b"[1]"), 400),
            (client.post("/v1/chat/completions", content=b"[" * 100_000), 400),
            (client.post("/v1/chat/completions", content=b" " * 5_000_000), 413),
            (complete(client, seed=-2), 400),
            (complete(client, messages=[{"role": "user", "content": "3 " * 5000}]), 400),
            (complete(client, model="numbers-2"), 404),
            (client.get("/v1/chat/completions"), 405),
            (client.get("/v1/completions"), 405),
        ):
            assert response.status_code == status
            assert "\n" not in response.text.strip()
        assert complete(client).status_code == 200


PAGE = "https://page.example"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://testserver"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example", "Content-Type": "text/plain"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://testserver"}, 200),
        ({"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}, 200),
    ],
    ids=str,
)
def test_web_pages_of_other_origins_cannot_send_requests(headers: dict[str, str], status: int) -> None:
    with http_client(new_station(), origins=[PAGE]) as client:
        response = client.post("/v1/chat/completions", content=json.dumps(FIELDS), headers=headers)
        assert response.status_code == status
        assert client.get("/v1/models", headers=headers).status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "origin"


def test_an_allowed_page_may_read_the_answer_and_asks_first() -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    with http_client(new_station(), origins=[PAGE]) as client:
        allowed = client.options("/v1/chat/completions", headers={"Origin": PAGE, **ask})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == PAGE
        assert client.options("/v1/chat/completions", headers={"Origin": "null", **ask}).status_code == 403


def test_an_allowed_page_may_ask_for_a_private_network_and_no_other_may() -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network": "true"}
    with http_client(new_station(), origins=[PAGE]) as client:
        allowed = client.options("/v1/chat/completions", headers={"Origin": PAGE, **ask})
        refused = client.options("/v1/chat/completions", headers={"Origin": "https://evil.example", **ask})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-private-network"] == "true"
    assert (refused.status_code, "access-control-allow-private-network" in refused.headers) == (403, False)


@pytest.mark.parametrize("origin", [PAGE, "http://127.0.0.1:3000", "http://[::1]:3000", "chrome-extension://abc"])
def test_an_origin_that_a_browser_sends_may_be_allowed(origin: str) -> None:
    check_origins([origin])


@pytest.mark.parametrize(
    "origin",
    ["", "*", "null", "page.example", f"{PAGE}/", f"{PAGE}/chat", f"{PAGE}:443", "https://Page.example", "https://é"],
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(SettingsError, match="cors-origin"):
        check_origins([PAGE, origin])


def test_unreachable_base_station_gives_503_until_it_answers_again() -> None:
    unreachable = threading.Event()
    with http_client(new_station(), lambda _: not unreachable.is_set()) as client:
        assert complete(client).status_code == 200
        assert client.get("/readyz").status_code == 200
        unreachable.set()
        response = complete(client)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == LinkError.code
        assert "no base station answers" in response.json()["error"]["message"]
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
        unreachable.clear()
        assert complete(client).status_code == 200
        assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize(("retry_seconds", "retry_after"), [(7, "7"), (0, "5")])
def test_full_base_station_gives_503_with_retry_after(retry_seconds: int, retry_after: str) -> None:
    transport = RefusingTransport(new_station())
    transport.opens_at, transport.retry_seconds = 90.0, retry_seconds
    with http_client(transport.station, transport=transport) as client:
        response = complete(client)
        assert (response.status_code, response.headers["retry-after"]) == (503, retry_after)
        assert response.json()["error"]["code"] == "full"
        assert response.json()["error"]["message"].startswith("the other end answered 'full': no room (waited ")
        assert text_of(target_alone(TARGET, PROMPT, 12)) == complete(client).json()["choices"][0]["message"]["content"]


def test_stream_ends_with_an_error_when_the_base_station_is_lost() -> None:
    sent = 0

    def lose_after_three(_: Message) -> int:
        nonlocal sent
        sent += 1
        return int(sent < 4)  # Hello, Open, a Draft

    with http_client(new_station(), lose_after_three) as client:
        lines = complete(client, stream=True).text.strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == LinkError.code


@pytest.mark.parametrize("stream", [False, True])
def test_an_unforeseen_error_ends_that_request_alone(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    with http_client(new_station()) as client:
        response = complete(client, messages=[{"role": "user", "content": "not a number"}], stream=stream)
        assert response.status_code == 500
        assert response.json()["error"]["message"].startswith("internal error")
        assert client.get("/healthz").status_code == 200
        assert content_of(complete(client)) == text_of(target_alone(TARGET, PROMPT, 12))
    assert "invalid literal" in caplog.text


def test_an_unforeseen_error_within_a_stream_is_its_last_event(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_at_third(_: object, token_ids: Iterator[int]) -> Iterator[str]:
        for count, token_id in enumerate(token_ids):
            if count == 2:
                raise ZeroDivisionError
            yield f"{token_id} "

    monkeypatch.setattr(NumberTokenizer, "decode_stream", fail_at_third)
    with http_client(new_station()) as client:
        lines = complete(client, stream=True).text.strip().split("\n\n")
    assert len(lines) == 4
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"].startswith("internal error")


def test_a_worker_that_cannot_go_on_ends_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, ended = new_worker(new_station()), threading.Event()
    monkeypatch.setattr(Connection, "keep_alive", lambda _: 1 / 0)
    client = TestClient(application(worker, "numbers", DEFAULTS, Access()))
    worker.start(ended.set)
    assert ended.wait(5)
    assert isinstance(worker.failure, ZeroDivisionError)
    assert client.get("/healthz").status_code == 503
    assert complete(client).status_code == 503
