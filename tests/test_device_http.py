"""The device over HTTP, with models of a few tokens: what is answered, refused, and lost."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from device.chat_request import ChatRequest, Defaults
from device.client import Client
from device.http import application, check_bind
from device.link import Link
from device.session import DraftSettings
from device.tokenizer import ChatMessage, Tokenizer
from device.worker import Event, Finish, Job, Question, Worker
from protocol.errors import BusyError, LinkError, SettingsError
from protocol.messages import Message, Mode, Open, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table, target_alone
from tests.link_pair import Fate, MemoryTransport, RefusingTransport, Station, join, once

TARGET = random_table(20, seed=1)
DRAFT = blend(TARGET, random_table(20, seed=2), 0.7)
PROMPT = [3, 1, 4, 1, 5]
FIELDS = {"messages": [{"role": "user", "content": "3 1 4 1 5"}], "max_tokens": 12}


class NumberTokenizer:
    """Token 7 is the text ``7`` and a blank."""

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        return [int(word) for message in messages for word in message["content"].split()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(self.decode_stream(iter(token_ids)))

    def decode_stream(self, token_ids: Iterator[int]) -> Iterator[str]:
        return (f"{token_id} " for token_id in token_ids)


def text_of(token_ids: Sequence[int]) -> str:
    return NumberTokenizer().decode(token_ids)


def settings(sampling: Sampling) -> DraftSettings:
    return DraftSettings(Mode.IDS if sampling.greedy else Mode.COUPLED, sampling, uplink_k=1, draft_len=4)


DEFAULTS = Defaults(temperature=0, top_k=0, top_p=1, seed=None, max_new_tokens=8, settings=settings)


def worker_of(
    station: Station, up: Fate = once, clock: Any = lambda: 0.0, transport: MemoryTransport | None = None
) -> Worker:
    model = FakeDraftModel.make(DRAFT)

    def connect() -> tuple[Link, Client]:
        client, link = join(station, model, transport or MemoryTransport(station, up=up))
        return link, client

    return Worker(model, cast(Tokenizer, NumberTokenizer()), connect, clock)


@contextmanager
def http_client(station: Station, up: Fate = once, transport: MemoryTransport | None = None) -> Iterator[TestClient]:
    worker = worker_of(station, up, transport=transport)
    worker.start()
    try:
        yield TestClient(application(worker, "numbers", DEFAULTS, ["testserver"]))
    finally:
        worker.stop(5)


def station() -> Station:
    return Station(FakeTarget.make(TARGET))


def complete(client: TestClient, **fields: object) -> Any:
    return client.post("/v1/chat/completions", json=FIELDS | fields)


def streamed(client: TestClient, **fields: object) -> list[Any]:
    lines = complete(client, stream=True, **fields).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_the_answer_is_the_targets_own() -> None:
    with http_client(station()) as client:
        answer = complete(client).json()
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": text_of(target_alone(TARGET, PROMPT, 12)),
    }
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}


def test_a_stream_has_the_same_text_token_by_token() -> None:
    with http_client(station()) as client:
        chunks = streamed(client, stream_options={"include_usage": True})
        usage = complete(client).json()["usage"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert [delta.get("content", "") for delta in deltas[1:-1]] == [
        text_of([token_id]) for token_id in target_alone(TARGET, PROMPT, 12)
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 13 + ["length"]
    assert chunks[-1]["usage"] == usage
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_seed_gives_the_same_answer_again_and_none_another() -> None:
    with http_client(station()) as client:
        texts = [
            complete(client, temperature=1.0, seed=seed).json()["choices"][0]["message"]["content"]
            for seed in (5, 5, 6, None, None)
        ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_a_stop_string_ends_the_answer() -> None:
    tokens = target_alone(TARGET, PROMPT, 12)
    stop = f"{tokens[4]} {tokens[5]}"
    with http_client(station()) as client:
        choice = complete(client, stop=stop).json()["choices"][0]
        chunks = streamed(client, stop=[stop])
    assert choice["message"]["content"] == text_of(tokens).partition(stop)[0]
    assert choice["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == choice["message"]["content"]


def test_a_conversation_goes_on_in_one_session() -> None:
    opened: list[Message] = []

    def watch(message: Message) -> int:
        opened.extend([message] if isinstance(message, Open) else [])
        return 1

    with http_client(station(), watch) as client:
        first = complete(client).json()["choices"][0]["message"]
        messages = [*FIELDS["messages"], first, {"role": "user", "content": "9 2 6"}]  # type: ignore[misc]
        second = complete(client, messages=messages).json()["choices"][0]["message"]["content"]
        prompt = [*PROMPT, *target_alone(TARGET, PROMPT, 12), 9, 2, 6]
        assert second == text_of(target_alone(TARGET, prompt, 12))
        assert len(opened) == 1
        complete(client, temperature=1)
        assert len(opened) == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, ["messages", "one message"]),
        ({"messages": "3 1 4"}, ["messages", "3 1 4", "a list"]),
        ({"messages": [{"role": "judge", "content": "3"}]}, ["judge", "system, user, assistant"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["image_url", "type text"]),
        ({"temperature": "hot"}, ["temperature", "hot", "a number"]),
        ({"temperature": True}, ["temperature", "True", "a number"]),
        ({"temperature": -1}, ["temperature", "-1"]),
        ({"temperature": 10**400}, ["temperature", "a number"]),
        ({"messages": [{"role": "user", "content": "3 \ud800"}]}, ["content", "text"]),
        ({"top_p": 0}, ["top_p", "0", "above 0"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"max_tokens": 0}, ["max_tokens", "0", "1 and more"]),
        ({"max_completion_tokens": 1.5}, ["max_completion_tokens", "1.5"]),
        ({"stop": ["a"] * 5}, ["stop", "up to 4"]),
        ({"stop": ""}, ["stop", "none of them empty"]),
        ({"n": 2}, ["n is 2", "1"]),
        ({"tools": [{"type": "function"}]}, ["tools", "function"]),
        ({"response_format": {"type": "json_object"}}, ["response_format", "json_object"]),
        ({"stream": "yes"}, ["stream", "yes", "true or false"]),
    ],
)
def test_what_is_not_served_is_refused_by_name(fields: dict[str, object], words: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        ChatRequest.read(FIELDS | fields, DEFAULTS)
    assert all(word in str(error.value) for word in words)


def test_neutral_and_unknown_fields_change_nothing() -> None:
    neutral = {"n": 1, "tools": None, "logprobs": False, "frequency_penalty": 0, "user": "me", "top_p": None}
    assert ChatRequest.read(FIELDS | neutral, DEFAULTS) == ChatRequest.read(FIELDS, DEFAULTS)


def test_text_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "3 1 4 "}, {"type": "text", "text": "1 5"}]
    messages = [{"role": "user", "content": parts}]
    assert ChatRequest.read(FIELDS | {"messages": messages}, DEFAULTS) == ChatRequest.read(FIELDS, DEFAULTS)


def test_a_refused_request_is_one_line_and_the_next_is_answered() -> None:
    with http_client(station()) as client:
        for response, status in (
            (client.post("/v1/chat/completions", content=b"{"), 400),
            (client.post("/v1/chat/completions", content=b"[1]"), 400),
            (client.post("/v1/chat/completions", content=b"[" * 100_000), 400),
            (client.post("/v1/chat/completions", content=b" " * 5_000_000), 413),
            (complete(client, seed=-1), 400),
            (complete(client, messages=[{"role": "user", "content": "3 " * 5000}]), 400),
            (complete(client, model="numbers-2"), 404),
            (client.get("/v1/chat/completions"), 405),
            (client.get("/v1/completions"), 404),
        ):
            assert response.status_code == status
            assert "\n" not in response.text.strip()
        assert complete(client).status_code == 200


def test_a_web_page_elsewhere_cannot_ask() -> None:
    client = TestClient(application(worker_of(station()), "numbers", DEFAULTS, ["testserver"]))
    assert client.get("/v1/models").json()["data"][0]["id"] == "numbers"
    assert client.get("/v1/models", headers={"host": "page.example"}).status_code == 400


def test_a_lost_base_station_is_503_until_it_answers_again() -> None:
    silent = threading.Event()
    with http_client(station(), lambda _: not silent.is_set()) as client:
        assert complete(client).status_code == 200
        assert client.get("/readyz").status_code == 200
        silent.set()
        response = complete(client)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == LinkError.code
        assert "no base station answers" in response.json()["error"]["message"]
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
        silent.clear()
        assert complete(client).status_code == 200
        assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize(("named", "told"), [(7, "7"), (0, "5")])
def test_a_full_base_station_is_503_that_says_when_to_come_back(named: int, told: str) -> None:
    transport = RefusingTransport(station())
    transport.opens_at, transport.retry_seconds = 90.0, named
    with http_client(transport.station, transport=transport) as client:
        response = complete(client)
        assert (response.status_code, response.headers["retry-after"]) == (503, told)
        assert response.json()["error"]["code"] == "full"
        assert response.json()["error"]["message"].startswith("the other end answered 'full': no room (waited ")
        assert text_of(target_alone(TARGET, PROMPT, 12)) == complete(client).json()["choices"][0]["message"]["content"]


def test_a_stream_tells_that_the_base_station_was_lost() -> None:
    heard = 0

    def lose(_: Message) -> int:
        nonlocal heard
        heard += 1
        return int(heard < 4)  # Hello, Open, a Draft

    with http_client(station(), lose) as client:
        lines = complete(client, stream=True).text.strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == LinkError.code


def test_ready_is_who_heard_the_base_station_recently() -> None:
    now = 0.0
    worker = worker_of(station(), clock=lambda: now)
    ready = [worker.ready]
    events = ask(worker, max_new_tokens=1)
    worker.start()
    events.end()
    now = 14.0
    ready.append(worker.ready)
    now = 16.0
    ready.append(worker.ready)
    worker.stop(5)
    assert ready == [False, True, False]


class Events:
    """What an asker is handed."""

    def __init__(self, leave_after: int | None = None) -> None:
        self.texts: list[str] = []
        self._leave_after = leave_after
        self._end: Finish | Exception | None = None
        self._ended = threading.Event()
        self.job: Job | None = None

    def deliver(self, event: Event) -> None:
        if isinstance(event, str):
            self.texts.append(event)
        else:
            self._end = event
            self._ended.set()
        if len(self.texts) == self._leave_after:
            assert self.job is not None
            self.job.abandoned.set()

    def end(self) -> Finish | Exception | None:
        assert self._ended.wait(10)
        return self._end


def ask(worker: Worker, max_new_tokens: int, leave_after: int | None = None) -> Events:
    events = Events(leave_after)
    message: ChatMessage = {"role": "user", "content": "3 1 4 1 5"}
    events.job = Job(Question((message,), settings(Sampling()), max_new_tokens), events.deliver)
    worker.ask(events.job)
    return events


def test_questions_are_answered_in_turn() -> None:
    worker = worker_of(station())
    asked = [ask(worker, count) for count in (9, 1, 5)]
    worker.start()
    assert [events.end() for events in asked] == [Finish("length", 5, count) for count in (9, 1, 5)]
    worker.stop(5)


def test_an_answer_that_nobody_waits_for_is_not_finished() -> None:
    worker = worker_of(station())
    left, stayed = ask(worker, 500, leave_after=3), ask(worker, 12)
    worker.start()
    stayed.end()
    worker.stop(5)
    assert len(left.texts) == 3
    assert "".join(stayed.texts) == text_of(target_alone(TARGET, PROMPT, 12))


def test_more_questions_than_can_wait_are_refused() -> None:
    worker = worker_of(station())
    for _ in range(16):
        ask(worker, 1)
    with pytest.raises(BusyError, match="16 questions wait"):
        ask(worker, 1)
    client = TestClient(application(worker, "numbers", DEFAULTS, ["testserver"]))
    assert complete(client).json()["error"]["code"] == BusyError.code


@pytest.mark.parametrize("bind", ["http://0.0.0.0:8080", "http://192.168.1.7:8080", "http://board.local:8080"])
def test_an_address_for_other_machines_needs_a_word(bind: str) -> None:
    with pytest.raises(SettingsError, match="--insecure"):
        check_bind(bind, insecure=False)
    check_bind(bind, insecure=True)


@pytest.mark.parametrize("bind", ["http://127.0.0.1:8080", "http://localhost:0", "http://[::1]:8080"])
def test_an_address_for_this_machine_needs_none(bind: str) -> None:
    check_bind(bind, insecure=False)


@pytest.mark.parametrize("bind", ["127.0.0.1:8080", "tcp://127.0.0.1:8080", "http://127.0.0.1", "http://127.0.0.1:x"])
def test_what_is_no_address_is_refused(bind: str) -> None:
    for insecure in (False, True):
        with pytest.raises(SettingsError, match=r"http://127\.0\.0\.1:8080"):
            check_bind(bind, insecure)
