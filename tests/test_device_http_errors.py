"""Every error of the HTTP service has OpenAI's shape, and names the field."""

import json
import threading
from typing import Any, NoReturn

import pytest
from starlette.testclient import TestClient

from common.grammar import GrammarCompiler
from device.answers.worker import Worker
from device.http.service import Access, application
from protocol.errors import TransientGrammarError
from tests.fakes import FakeTarget
from tests.json_tokens import PIECES, json_tokenizer
from tests.link_pair import Station
from tests.number_service import (
    DEFAULTS,
    FIELDS,
    TARGET,
    NumberTokenizer,
    OpenCounter,
    complete,
    http_client,
    new_station,
    new_worker,
)

INVALID = "invalid_request_error"
LONG = "3 " * 5000


def error_of(response: Any) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 400
    return error


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"temperature": "hot"}, 400, "invalid_value", "temperature"),
        ({"temperature": -1}, 400, "invalid_value", "temperature"),
        ({"top_p": 0}, 400, "invalid_value", "top_p"),
        ({"seed": -2}, 400, "invalid_value", "seed"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": 0}, 400, "invalid_value", "max_completion_tokens"),
        ({"stop": [None]}, 400, "invalid_value", "stop"),
        ({"tools": [{"type": "function"}]}, 400, "invalid_value", "tools"),
        ({"messages": [{"role": "critic", "content": "3"}]}, 400, "invalid_value", "messages[0]"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user", "content": LONG}]}, 400, "context_length_exceeded", "messages"),
        ({"model": "numbers-2"}, 404, "model_not_found", "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_error_names_status_code_and_field(fields: dict[str, Any], status: int, code: str, param: str) -> None:
    with http_client(new_station()) as client:
        response = complete(client, **fields)
    error = error_of(response)
    assert (response.status_code, error["type"], error["code"], error["param"]) == (status, INVALID, code, param)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [(LONG, "context_length_exceeded"), ([20], "invalid_value"), ([], "invalid_value")],
    ids=["long", "unknown", "empty"],
)
def test_an_error_of_a_text_completion_names_its_prompt(prompt: object, code: str) -> None:
    with http_client(new_station()) as client:
        response = client.post("/v1/completions", json={"prompt": prompt})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, code, "prompt")


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[1]", 400),
        ("POST", "/v1/chat/completions", b"\xff", 400),
        ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "3 \\ud800"}]}', 400),
        ("POST", "/v1/chat/completions", b" " * 5_000_000, 413),
        ("POST", "/v1/embeddings", b"{}", 404),
        ("DELETE", "/v1/chat/completions", b"", 405),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_request_that_cannot_be_read_gets_json(method: str, path: str, content: bytes, status: int) -> None:
    with http_client(new_station()) as client:
        response = client.request(method, path, content=content)
    assert (response.status_code, error_of(response)["type"]) == (status, INVALID)
    assert status != 405 or response.headers["allow"] == "POST"


DEEP = json.loads('{"a": ' * 600 + "1" + "}" * 600)
DEEP_CALL = {"function": {"name": "f", "arguments": json.dumps(DEEP)}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]}, "the request"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}}, "the request"),
        ({"invented": DEEP}, "the request"),
        ({"messages": [{"role": "assistant", "tool_calls": [DEEP_CALL]}]}, "messages[0].tool_calls[0].function.argum"),
        ({"regex": "3\ud800"}, "regex"),
        ({"grammar": "start: \ud800"}, "grammar"),
        ({"\ud800": 1}, "\\ud800"),
        ({"messages": [{"role": "user", "content": "3", "\ud800": 1}]}, "messages[0].\\ud800"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages[0].function_call"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_used_is_refused_by_name_and_ends_no_connection(fields: dict[str, Any], param: str) -> None:
    opened = OpenCounter()
    with http_client(new_station(), opened) as client:
        before = complete(client).json()
        body = json.dumps({"messages": [{"role": "user", "content": "3"}]} | fields)
        response = client.post("/v1/chat/completions", content=body)
        complete(client, messages=next_turn_of(before))
    error = error_of(response)
    assert (response.status_code, error["type"]) == (400, INVALID)
    assert (error["param"] or "the request").startswith(param)
    assert opened.opens == 1


def next_turn_of(answer: Any) -> list[Any]:
    return [*FIELDS["messages"], answer["choices"][0]["message"], {"role": "user", "content": "9"}]  # type: ignore[misc]


def test_a_foreign_host_gets_json() -> None:
    with http_client(new_station()) as client:
        for host in ("page.example", "page.example:8080", "testserver.page.example", "[", ""):
            response = client.get("/v1/models", headers={"host": host})
            assert (response.status_code, error_of(response)["code"]) == (400, "host")
        assert client.get("/v1/models", headers={"host": "TESTSERVER:8080"}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{"strict": True, "name": None}]}, '[{"strict": true, "name": null}]'),
        ({"chat_template_kwargs": {"a": None}}, 'chat_template_kwargs is {"a": null}; allowed: {} or left out'),
        ({"response_format": {"type": "x"}}, 'response_format is {"type": "x"}; allowed: text, json_object'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, '[{"type": "image_url"}]'),
        ({"model": ["a", None]}, '["a", null]'),
    ],
    ids=str,
)
def test_a_message_shows_values_as_json(fields: dict[str, Any], words: str) -> None:
    with http_client(new_station()) as client:
        assert words in error_of(complete(client, **fields))["message"]


@pytest.mark.parametrize("name", ["tools", "messages", "model", "stop"])
def test_a_message_does_not_repeat_a_long_value(name: str) -> None:
    with http_client(new_station()) as client:
        assert "…" in error_of(complete(client, **{name: {"key": LONG}}))["message"]


def test_a_defect_gets_json_without_details(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("inner detail")

    monkeypatch.setattr(Worker, "submit", fail)
    app = application(new_worker(new_station()), "numbers", DEFAULTS, Access())
    response = complete(TestClient(app, raise_server_exceptions=False))
    assert (response.status_code, error_of(response)["type"]) == (500, "server_error")
    assert "inner" not in response.text


def test_an_unreachable_base_station_is_a_server_error_with_its_own_code() -> None:
    with http_client(new_station(), up=lambda _: 0) as client:
        response = complete(client)
    error = error_of(response)
    assert (response.status_code, error["type"], error["code"], error["param"]) == (503, "server_error", "link", None)


@pytest.mark.parametrize("where", ["device", "base station"])
def test_a_grammar_that_cannot_be_compiled_now_is_a_server_error_that_says_when_to_retry(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise TransientGrammarError("the grammar cannot be compiled: this machine is busy; try again")

    if where == "device":
        monkeypatch.setattr(NumberTokenizer, "grammar", fail)
    compiler = GrammarCompiler(json_tokenizer, len(PIECES), fail)
    with http_client(Station(FakeTarget.make(TARGET, grammar_compiler=compiler))) as client:
        response = complete(client, regex="[0-3]{4}")
    error = error_of(response)
    assert (response.status_code, error["type"], error["code"]) == (503, "server_error", "grammar")
    assert int(response.headers["retry-after"]) > 0


class Panic(BaseException):
    """What PyO3 raises for a panic of a library in Rust."""


def raising(error: BaseException) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.timeout(30)
@pytest.mark.parametrize("step", ["encode_chat", "decode_stream"])
def test_a_panic_of_a_library_ends_that_request_alone(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with http_client(new_station()) as client:
        with monkeypatch.context() as patch:
            patch.setattr(NumberTokenizer, step, raising(Panic("unwrap on a None value")))
            response = complete(client)
        assert (response.status_code, error_of(response)["type"]) == (500, "server_error")
        assert complete(client).status_code == 200


@pytest.mark.timeout(30)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=["interrupt", "exit"])
def test_an_exit_in_an_answer_ends_the_service(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumberTokenizer, "decode_stream", raising(error))
    worker, ended = new_worker(new_station()), threading.Event()
    worker.start(ended.set)
    response = complete(TestClient(application(worker, "numbers", DEFAULTS, Access())))
    assert ended.wait(10)
    assert response.status_code == 503
    assert worker.failure is error
