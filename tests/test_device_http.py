"""The device's HTTP service, with models without weights: answers, refused requests, a lost base station."""

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from starlette.testclient import TestClient

from device.answers.job import AnswerRequest, Event, Finish, Job
from device.answers.worker import Worker
from device.http.chat_request import ChatRequest
from device.http.origin_check import check_origins
from device.http.service import Access, application
from device.link.connection import Connection
from device.text.tokenizer import ChatMessage
from protocol.errors import BusyError, LinkError, SettingsError
from protocol.messages import Message, Sampling
from tests import json_tokens
from tests.fakes import FakeTarget, target_alone
from tests.link_pair import RefusingTransport, Station
from tests.number_service import (
    DEFAULTS,
    FIELDS,
    PROMPT,
    TARGET,
    NumberTokenizer,
    OpenCounter,
    complete,
    content_of,
    http_client,
    new_station,
    new_worker,
    next_turn,
    settings,
    streamed,
    text_of,
)
from tests.slow_sampling import slow_answer

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


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, ["messages", "one message"]),
        ({"messages": "3 1 4"}, ["messages", "3 1 4", "a list"]),
        ({"messages": [{"role": "critic", "content": "3"}]}, ["critic", "system, user, assistant"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["image_url", "type text"]),
        ({"temperature": "hot"}, ["temperature", "hot", "a number"]),
        ({"temperature": True}, ["temperature", "True", "a number"]),
        ({"temperature": -1}, ["temperature", "-1"]),
        ({"temperature": 10**400}, ["temperature", "a number"]),
        ({"messages": [{"role": "user", "content": "3 \ud800"}]}, ["content", "text"]),
        ({"top_p": 0}, ["top_p", "0", "above 0"]),
        ({"seed": -2}, ["seed", "-2"]),
        ({"top_k": -2}, ["top", "-2"]),
        ({"top_k": 1.5}, ["top_k", "1.5", "a whole number"]),
        ({"max_tokens": 0}, ["max_tokens", "0", "1 or more"]),
        ({"max_completion_tokens": 1.5}, ["max_completion_tokens", "1.5"]),
        ({"stop": ["a"] * 5}, ["stop", "up to 4"]),
        ({"stop": ""}, ["stop", "none of them empty"]),
        ({"n": 9}, ["n is 9", "1 to 8"]),
        ({"logprobs": 2}, ["logprobs", "true or false"]),
        ({"top_logprobs": 3}, ["top_logprobs", "3", "together with logprobs"]),
        ({"logprobs": True, "top_logprobs": 21}, ["top_logprobs", "21", "up to 20"]),
        ({"tools": [{"type": "function"}]}, ["tools", "function"]),
        ({"tool_choice": "required"}, ["tool_choice", "required", "names one of the tools"]),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, ["tool_calls[0]", "function"]),
        ({"response_format": {"type": "yaml"}}, ["response_format", "yaml", "json_object"]),
        ({"response_format": {"type": "json_schema"}}, ["response_format", "json_schema.schema"]),
        ({"response_format": {"type": "json_object", "schema": "S"}}, ["response_format", "S", "an object schema"]),
        ({"response_format": {"type": "json_object", "json_schema": {"a": 1}}}, ["json_schema", "left out"]),
        ({"response_format": {"type": "text", "schema": {"type": "array"}}}, ["response_format.schema", "left out"]),
        ({"response_format": {"type": "json_schema", "json_schema": {"a": 1}}}, ["json_schema.a", "left out"]),
        ({"prediction": {"content": "3", "weight": 2}}, ["prediction.weight", "left out"]),
        ({"grammar": "a", "regex": "b"}, ["grammar", "one of response_format, grammar and regex"]),
        ({"regex": 3}, ["regex", "3", "a regular expression"]),
        ({"regex": "a", "min_tokens": 2}, ["min_tokens", "2", "0 with a grammar"]),
        ({"stream": "yes"}, ["stream", "yes", "true or false"]),
        ({"presence_penalty": 3}, ["presence_penalty", "3", "-2 to 2"]),
        ({"logit_bias": {"a": 1}}, ["logit_bias", "'a'", "token ids"]),
        ({"logit_bias": {"1": "2"}}, ["logit_bias.1", "'2'", "a number"]),
        ({"logit_bias": {str(one): 1 for one in range(200_000)}}, ["logit_bias", "200000 tokens", "up to 1024"]),
        ({"stop_token_ids": ["3"]}, ["stop_token_ids", "token ids"]),
        ({"ignore_eos": 1}, ["ignore_eos", "true or false"]),
    ],
)
def test_invalid_or_unsupported_field_is_refused_by_name(fields: dict[str, object], words: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        ChatRequest.read(FIELDS | fields, DEFAULTS)
    assert all(word in str(error.value) for word in words)


def test_a_schema_of_llama_cpp_is_that_of_openai() -> None:
    schema = {"type": "array", "items": {"type": "integer"}}
    formats = [{"type": "json_object", "schema": schema}, {"type": "json_schema", "json_schema": {"schema": schema}}]
    requests = [ChatRequest.read(FIELDS | {"response_format": one}, DEFAULTS) for one in formats]
    assert requests[0] == requests[1]
    assert requests[0] != ChatRequest.read(FIELDS | {"response_format": {"type": "json_object"}}, DEFAULTS)


def test_neutral_fields_are_ignored() -> None:
    neutral = {"n": 1, "tools": None, "logprobs": False, "frequency_penalty": 0, "user": "me", "top_p": None}
    assert ChatRequest.read(FIELDS | neutral, DEFAULTS) == ChatRequest.read(FIELDS, DEFAULTS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 2),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("guided_json", {"type": "object"}),
        ("echo", True),
        ("typical_p", 0.9),
    ],
)
def test_a_field_that_would_change_the_answer_is_honoured_or_refused(name: str, value: object) -> None:
    with http_client(new_station()) as client:
        response = complete(client, **{name: value})
    assert response.status_code == 400
    assert f"{name} is" in response.json()["error"]["message"]
    assert "left out" in response.json()["error"]["message"]


def test_sampling_settings_of_a_request_reach_the_base_station() -> None:
    fields: dict[str, Any] = {
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 1,
        "logit_bias": {"7": 3, "5": -100},
        "min_tokens": 5,
        "ignore_eos": True,
        "stop_token_ids": [9],
    }
    sampling = ChatRequest.read(FIELDS | fields, DEFAULTS).choices[0].settings.sampling
    assert sampling == Sampling(0, 0, 1, 0, 0.1, 1.2, 0.5, 1.0, ((7, 3.0), (5, -100.0)), 5, True, (9,))
    with http_client(new_station()) as client:
        assert content_of(complete(client, **fields)) == text_of(slow_answer(TARGET, sampling, PROMPT, 12, ()))
        refused = complete(client, stop_token_ids=[20])
        assert refused.status_code == 400
        assert "token ids from 0 to 19" in refused.json()["error"]["message"]
        assert content_of(complete(client)) == text_of(target_alone(TARGET, PROMPT, 12))


def test_a_response_format_restricts_the_answer() -> None:
    schema = {"type": "array", "items": {"enum": [1, True, "a"]}, "maxItems": 3}
    json_schema = {"type": "json_schema", "json_schema": {"name": "list", "schema": schema}}
    target = FakeTarget.make(TARGET, frozenset({json_tokens.STOP}), grammar_compiler=json_tokens.COMPILER)
    with http_client(Station(target)) as client:
        for fields in ({"response_format": json_schema}, {"grammar": 'start: "[" "1" "]"'}, {"regex": "[0-3]{4}"}):
            choice = complete(client, max_tokens=40, **fields).json()["choices"][0]
            text = json_tokens.text_of([int(word) for word in choice["message"]["content"].split()])
            assert choice["finish_reason"] == "stop"
            assert "regex" in fields or set(json.loads(text)) <= {1, "a"}
        for refused in ({"regex": "("}, {"response_format": {"type": "json_schema", "json_schema": {"schema": BAD}}}):
            response = complete(client, **refused)
            assert response.status_code == 400
            assert "cannot be compiled" in response.json()["error"]["message"]
        assert complete(client).status_code == 200
    with http_client(new_station()) as client:
        response = complete(client, response_format={"type": "json_object"})
        assert (response.status_code, "has no grammars" in response.text) == (400, True)


BAD = {"type": "object", "propertyNames": {"pattern": "a"}}


def test_the_last_message_is_continued_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def encode_chat(_: object, messages: Sequence[ChatMessage], __: object, continue_final: bool) -> list[int]:
        asked.append(continue_final)
        return NumberTokenizer().encode(" ".join(message["content"] for message in messages))

    monkeypatch.setattr(NumberTokenizer, "encode_chat", encode_chat)
    begun = [*FIELDS["messages"], {"role": "assistant", "content": "9"}]  # type: ignore[misc]
    with http_client(new_station()) as client:
        continued = complete(client, messages=begun, continue_final_message=True, add_generation_prompt=False)
        complete(client, messages=begun)
        refused = [
            complete(client, continue_final_message=True),
            complete(client, add_generation_prompt=False),
            complete(client, messages=begun, continue_final_message=True, add_generation_prompt=True),
        ]
    assert content_of(continued) == text_of(target_alone(TARGET, [*PROMPT, 9], 12))
    assert asked == [True, False]
    assert [one.json()["error"]["param"] for one in refused] == [
        "continue_final_message",
        "add_generation_prompt",
        "add_generation_prompt",
    ]


def test_top_k_of_a_request_limits_what_is_sampled() -> None:
    """With one candidate a sampled answer is the greedy one."""
    with http_client(new_station()) as client:
        assert content_of(complete(client, temperature=1.5, top_k=1)) == text_of(target_alone(TARGET, PROMPT, 12))
    assert ChatRequest.read(FIELDS | {"top_k": -1}, DEFAULTS).choices[0].settings.sampling.top_k == 0


def test_minus_one_is_a_random_seed_and_no_limit_of_tokens() -> None:
    requests = [ChatRequest.read(FIELDS | {"temperature": 1, "seed": -1}, DEFAULTS).choices[0] for _ in range(2)]
    assert requests[0].settings.sampling.seed != requests[1].settings.sampling.seed
    station = Station(FakeTarget.make(TARGET, context_length=40))
    with http_client(station) as client:
        usage = complete(client, max_tokens=-1).json()["usage"]
    assert usage["total_tokens"] == 40


def test_messages_are_read_as_their_senders_mean_them() -> None:
    messages = [
        {"role": "developer", "content": "3 1"},
        {"role": "user", "content": "4"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": "1 5"},
    ]
    read = ChatRequest.read(FIELDS | {"messages": messages}, DEFAULTS).choices[0].prompt
    assert [(one["role"], one["content"]) for one in read if isinstance(one, dict)] == [
        ("system", "3 1"),
        ("user", "4"),
        ("assistant", ""),
        ("user", "1 5"),
    ]


def test_content_may_be_a_list_of_text_parts() -> None:
    parts = [{"type": "text", "text": "3 1 4 "}, {"type": "text", "text": "1 5"}]
    messages = [{"role": "user", "content": parts}]
    assert ChatRequest.read(FIELDS | {"messages": messages}, DEFAULTS) == ChatRequest.read(FIELDS, DEFAULTS)


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


def test_worker_is_ready_if_the_base_station_answered_recently() -> None:
    now = 0.0
    worker = new_worker(new_station(), clock=lambda: now)
    readiness = [worker.ready]
    events = submit(worker, max_new_tokens=1)
    worker.start()
    events.end()
    now = 14.0
    readiness.append(worker.ready)
    now = 16.0
    readiness.append(worker.ready)
    worker.stop(5)
    assert readiness == [False, True, False]


class Events:
    """Collects what a job delivers, and cancels it after ``cancel_after`` texts."""

    def __init__(self, cancel_after: int | None = None) -> None:
        self.texts: list[str] = []
        self._cancel_after = cancel_after
        self._end: Finish | Exception | None = None
        self._ended = threading.Event()
        self.job: Job | None = None

    def deliver(self, event: Event) -> None:
        if isinstance(event, str):
            self.texts.append(event)
        elif isinstance(event, Finish | Exception):
            self._end = event
            self._ended.set()
        if len(self.texts) == self._cancel_after:
            assert self.job is not None
            self.job.cancelled.set()

    def end(self) -> Finish | Exception | None:
        assert self._ended.wait(10)
        return self._end


def submit(worker: Worker, max_new_tokens: int, cancel_after: int | None = None) -> Events:
    events = Events(cancel_after)
    message: ChatMessage = {"role": "user", "content": "3 1 4 1 5"}
    events.job = Job(AnswerRequest((message,), settings(Sampling()), max_new_tokens), events.deliver)
    worker.submit(events.job)
    return events


def test_jobs_are_answered_in_order() -> None:
    worker = new_worker(new_station())
    submitted = [submit(worker, count) for count in (9, 1, 5)]
    worker.start()
    assert [events.end() for events in submitted] == [Finish("length", 5, count) for count in (9, 1, 5)]
    worker.stop(5)


def test_cancelled_job_is_not_finished() -> None:
    worker = new_worker(new_station())
    cancelled, finished = submit(worker, 500, cancel_after=3), submit(worker, 12)
    worker.start()
    finished.end()
    worker.stop(5)
    assert len(cancelled.texts) == 3
    assert "".join(finished.texts) == text_of(target_alone(TARGET, PROMPT, 12))


def test_job_is_refused_when_the_queue_is_full() -> None:
    worker = new_worker(new_station())
    for _ in range(16):
        submit(worker, 1)
    with pytest.raises(BusyError, match="16 requests are waiting"):
        submit(worker, 1)
    client = TestClient(application(worker, "numbers", DEFAULTS, Access()))
    response = complete(client)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
