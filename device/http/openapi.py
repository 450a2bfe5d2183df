"""The service's description of itself as an OpenAPI document, for ``/openapi.json`` and docs/http.md."""

from collections.abc import Collection, Mapping
from importlib.metadata import version

from device.http.http_answers import answer_schemas, ref
from device.http.http_fields import CHAT_FIELDS, IGNORED, ONLY_VALUES, SHARED_FIELDS, TEXT_FIELDS, Schema
from device.http.request_fields import Fields


def openapi() -> Fields:
    """The document."""
    description = "OpenAI's chat and text completions, tokens, health and metrics of a device."
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgedraft-device serve", "version": version("edgedraft"), "description": description},
        "paths": {path: {method: operation} for path, method, operation in _operations()},
        "components": {"schemas": _requests() | answer_schemas()},
    }


def _operations() -> list[tuple[str, str, Fields]]:
    """Path, method and operation of each route."""
    text = {"text/plain": {"schema": {"type": "string"}}}
    return [
        ("/v1/chat/completions", "post", _completion("Answer a conversation", "Chat")),
        ("/v1/completions", "post", _completion("Continue texts", "Text")),
        ("/v1/models", "get", _operation("The list of the one model", _json("Models"))),
        ("/v1/models/{name}", "get", _operation("The model, or 404", _json("Model"))),
        ("/tokenize", "post", _operation("The token ids of a text", _json("Tokens"), "Content")),
        ("/detokenize", "post", _operation("The text of token ids", _json("Content"), "Tokens")),
        ("/health", "get", _operation("As `/readyz`", text)),
        ("/healthz", "get", _operation("200 while the service can answer", text)),
        (
            "/readyz",
            "get",
            _operation("200 if the base station answered within the last 15 s or none is used, else 503", text),
        ),
        ("/metrics", "get", _operation("Figures in Prometheus' format", text)),
        ("/openapi.json", "get", _operation("This description", {"application/json": {}})),
    ]


def _completion(summary: str, kind: str) -> Fields:
    stream = {"text/event-stream": {"schema": ref(f"{kind}Chunk")}}
    return _operation(summary, _json(f"{kind}Answer") | stream, f"{kind}Request")


def _operation(summary: str, content: Fields, request: str | None = None) -> Fields:
    error = {"description": "an error", "content": _json("Error")}
    operation: Fields = {
        "summary": summary,
        "responses": {"200": {"description": "OK", "content": content}, "default": error},
    }
    return operation | ({"requestBody": {"required": True, "content": _json(request)}} if request else {})


def _requests() -> Fields:
    own = {**CHAT_FIELDS, **TEXT_FIELDS}
    other = {name: _only(name) for name in ONLY_VALUES if name not in own}
    ignored = {name: {"description": "ignored"} for name in IGNORED}
    shared = {"type": "object", "properties": {**SHARED_FIELDS, **other, **ignored}}
    return {
        "Request": shared | {"description": "The fields of both kinds of request. Null stands for the default."},
        "ChatRequest": _request("messages", CHAT_FIELDS, TEXT_FIELDS),
        "TextRequest": _request("prompt", TEXT_FIELDS, CHAT_FIELDS),
    }


def _request(required: str, fields: Mapping[str, Schema], others: Collection[str]) -> Fields:
    only = {name: _only(name) for name in ONLY_VALUES if name in others and name not in fields}
    return {
        "type": "object",
        "description": "Besides the fields of Request; any further field is refused with 400.",
        "allOf": [ref("Request")],
        "properties": {**fields, **only},
        "required": [required],
        "unevaluatedProperties": False,
    }


def _only(name: str) -> Fields:
    return {"enum": [*ONLY_VALUES[name]], "description": "not supported; may have this value, which changes nothing"}


def _json(name: str) -> Fields:
    return {"application/json": {"schema": ref(name)}}
