"""The service's description of itself: what it says is what is read and sent."""

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from device.http.chat_request import ChatRequest
from device.http.http_fields import (
    CHAT_FIELDS,
    EXTENSION_FIELDS,
    IGNORED,
    ONLY_VALUES,
    SHARED_FIELDS,
    TEXT_FIELDS,
    Schema,
)
from device.http.openapi import openapi
from device.http.text_request import TextRequest
from device.text.tool_calls import ToolFormat
from protocol.errors import SettingsError
from tests.fakes import PROMPT
from tests.http_page import page
from tests.number_service import DEFAULTS, FIELDS, NumberTokenizer, http_client, new_station
from tests.sample import PROJECT

DOCUMENT = openapi()
SCHEMAS = DOCUMENT["components"]["schemas"]
WEATHER = {"type": "function", "function": {"name": "weather"}}
CHAT: Mapping[str, Any] = FIELDS
TEXT: Mapping[str, Any] = {"prompt": PROMPT, "max_tokens": 3}
REQUESTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT),
    "rounds": ("/v1/chat/completions", {**CHAT, "edgedraft": {"rounds": True}}),
    "logprobs": ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 1}),
    "tools": ("/v1/chat/completions", {**CHAT, "tools": [WEATHER], "tool_choice": "auto"}),
    "text": ("/v1/completions", TEXT),
    "echo": ("/v1/completions", {**TEXT, "echo": True, "logprobs": 1, "n": 2}),
    "tokenize": ("/tokenize", {"content": "3 1"}),
    "detokenize": ("/detokenize", {"tokens": [3, 1]}),
}


def validator(schema: Schema) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def schema_of(path: str, kind: str, method: str = "post") -> Schema:
    """Of what an address answers with status 200."""
    content = DOCUMENT["paths"][path][method]["responses"]["200"]["content"]
    schema: Schema = content[kind]["schema"]
    return schema


def test_the_page_is_made_from_the_description() -> None:
    """Write it with ``python -m tests.http_page docs/http.md``."""
    assert (PROJECT / "docs" / "http.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_valid(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])


def test_the_service_sends_its_description() -> None:
    with http_client(new_station()) as client:
        assert client.get("/openapi.json").json() == json.loads(json.dumps(DOCUMENT))
        addresses = {path for path, methods in DOCUMENT["paths"].items() if "get" in methods and "{" not in path}
        assert {client.get(path).status_code for path in addresses} <= {200, 503}
        for path in ("/v1/models", "/v1/models/numbers"):
            described = path.replace("numbers", "{name}")
            validator(schema_of(described, "application/json", "get")).validate(client.get(path).json())


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_and_answers_are_as_described(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumberTokenizer, "tool_format", ToolFormat.HERMES)
    path, request = REQUESTS[name]
    body = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator(body).validate(request)
    with http_client(new_station()) as client:
        validator(schema_of(path, "application/json")).validate(client.post(path, json=request).json())
        error = client.post(path, json={**request, "content": 3, "tokens": 3}).json()
        validator({"$ref": "#/components/schemas/Error"}).validate(error)
        if "completions" not in path:
            return
        events = client.post(path, json={**request, "stream": True, "stream_options": {"include_usage": True}}).text
    chunks = events.removesuffix("data: [DONE]\n\n").strip().split("\n\n")
    assert len(chunks) > 2
    for chunk in chunks:
        validator(schema_of(path, "text/event-stream")).validate(json.loads(chunk.removeprefix("data: ")))


@pytest.mark.parametrize(("kind", "request_fields"), [(ChatRequest, CHAT), (TextRequest, TEXT)], ids=["chat", "text"])
def test_a_field_is_named_or_refused(
    kind: type[ChatRequest] | type[TextRequest], request_fields: Mapping[str, Any]
) -> None:
    own = {**SHARED_FIELDS, **(CHAT_FIELDS if kind is ChatRequest else TEXT_FIELDS)}
    expected = kind.read(request_fields, DEFAULTS)
    harmless = {name: values[-1] for name, values in ONLY_VALUES.items() if name not in own}
    given = {**request_fields, **harmless, **dict.fromkeys(IGNORED, "some"), **dict.fromkeys(["beams"])}
    assert kind.read(given, DEFAULTS) == expected
    for name in [*harmless, "beams", "repeat_penalty", "guided_json", "prompt" if kind is ChatRequest else "messages"]:
        with pytest.raises(SettingsError, match=f"{name} is .*left out"):
            kind.read({**request_fields, name: "other"}, DEFAULTS)


LIMITED = [(name, schema) for name, schema in {**CHAT_FIELDS, **SHARED_FIELDS}.items() if "minimum" in schema]
WITH = {"top_logprobs": {"logprobs": True}}


@pytest.mark.parametrize(("name", "schema"), LIMITED, ids=[name for name, _ in LIMITED])
def test_numbers_have_the_limits_that_are_described(name: str, schema: Schema) -> None:
    fields = {**CHAT, **WITH.get(name, {})}
    for value in {schema["minimum"], schema.get("maximum", schema["minimum"])}:
        ChatRequest.read({**fields, name: value}, DEFAULTS)
    outside = [schema["minimum"] - 1, *([schema["maximum"] + 1] if "maximum" in schema else [])]
    for value in outside:
        with pytest.raises(SettingsError, match=f"{name} is"):
            ChatRequest.read({**fields, name: value}, DEFAULTS)


def test_every_field_is_of_the_described_type() -> None:
    for name, schema in {**CHAT_FIELDS, **SHARED_FIELDS}.items():
        if name != "model":  # checked against the name of the served model
            with pytest.raises(SettingsError, match=f"{name}"):
                ChatRequest.read({**CHAT, name: 1.5 if schema["type"] != "number" else "1.5"}, DEFAULTS)


def test_the_table_of_the_field_edgedraft_has_all_its_fields() -> None:
    text = (PROJECT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = text.partition("### The field edgedraft")[2].partition("Other fields of it")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [*EXTENSION_FIELDS]
