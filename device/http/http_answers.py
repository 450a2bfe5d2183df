"""The JSON schemas of answers over HTTP, by the names that ``openapi.py`` gives them."""

from collections.abc import Collection, Mapping
from typing import Any

from device.http.http_fields import schema
from device.http.request_fields import Fields
from device.session.session import Origin


def answer_schemas() -> Fields:
    """The schema of each kind of object in answers."""
    head = {
        "id": schema("string", "of the answer"),
        "object": schema("string", "the kind of object"),
        "created": schema("integer", "seconds since 1970"),
        "model": schema("string", "the served model's name"),
    }
    chat_choice = {"message": ref("Message"), "logprobs": schema("object", "as OpenAI's, where asked for")}
    logprobs = schema(["object", "null"], "as OpenAI's, where asked for")
    text_choice = {"text": schema("string", "the continuation, or what the chunk adds to it"), "logprobs": logprobs}
    chunk_choice = {"delta": ref("Message"), "logprobs": schema("object", "as OpenAI's, where asked for")}
    rounds = _object({"rounds": schema("array", "of the answer, where asked for", items=ref("Round"))})
    return {
        "ChatAnswer": _answer(head, _choice(chat_choice, {"edgedraft": rounds}, optional=["logprobs"])),
        "TextAnswer": _answer(head, _choice(text_choice, {"edgedraft": rounds})),
        "ChatChunk": _chunk(head, _choice(chunk_choice, optional=["logprobs"])),
        "TextChunk": _chunk(head, _choice(text_choice)),
        "Message": _message(),
        "Usage": _usage(),
        "Timings": _timings(),
        "Round": _round(),
        "Revision": _revision(),
        "Models": _object(
            {"object": schema("string", "list"), "data": schema("array", "one model", items=ref("Model"))}
        ),
        "Model": _object({**_MODEL, "edgedraft": schema("object", "vocabulary size and defaults")}),
        "Tokens": _object({"tokens": schema("array", "token ids", items={"type": "integer"})}),
        "Content": _object({"content": schema("string", "a text")}),
        "Error": _object({"error": _object(_ERROR)}),
    }


_MODEL = {
    "id": schema("string", "its name"),
    "object": schema("string", "model"),
    "created": schema("integer", "seconds since 1970"),
    "owned_by": schema("string", "edgedraft"),
}
_ERROR = {
    "message": schema("string", "one line: the value, and what is allowed"),
    "type": schema("string", "the class of the error"),
    "param": schema(["string", "null"], "the field of the request"),
    "code": schema(["string", "null"], "the kind of the error"),
}


def _message() -> Fields:
    return _object(
        {
            "role": schema("string", "assistant"),
            "content": schema(["string", "null"], "the text; in a chunk what it adds"),
            "tool_calls": schema(
                "array",
                "whole calls: `id`, `type`, `function` with `name` and `arguments`; in a chunk also `index`",
                items={"type": "object"},
            ),
        },
        optional=["role", "content", "tool_calls"],
    )


def _choice(
    own: Mapping[str, Any], extension: Mapping[str, Any] | None = None, optional: Collection[str] = ()
) -> Fields:
    finish = schema(["string", "null"], "stop, length or tool_calls; null in a chunk that is not the last")
    fields = {"index": schema("integer", "of the choice"), **own, "finish_reason": finish, **(extension or {})}
    return _object(fields, optional=[*optional, *(extension or {})])


def _answer(head: Mapping[str, Any], choice: Fields) -> Fields:
    choices = schema("array", "the answers", items=choice)
    return _object({**head, "choices": choices, "usage": ref("Usage"), "timings": ref("Timings")})


def _chunk(head: Mapping[str, Any], choice: Fields) -> Fields:
    """A chunk; the last of a choice has its timings, and one after all choices the usage if asked for."""
    own = {
        "anyOf": [ref("Round"), ref("Revision")],
        "description": "[Round](#round), or [Revision](#revision) of text that may be unverified",
    }
    further = {"usage": ref("Usage"), "timings": ref("Timings"), "edgedraft": own}
    return _object(
        {**head, "choices": schema("array", "one, or none beside `usage`", items=choice), **further}, optional=further
    )


def _usage() -> Fields:
    """Token counts; with a prediction, how much of it was right."""
    predicted = _object(
        {
            "accepted_prediction_tokens": schema("integer", "tokens of the prediction in the answer"),
            "rejected_prediction_tokens": schema("integer", "those that were drafted and rejected"),
        }
    )
    cached = _object({"cached_tokens": schema("integer", "prompt tokens that were not sent again")})
    return _object(
        {
            "prompt_tokens": schema("integer", "of all prompts; a prompt with several choices counts once"),
            "completion_tokens": schema("integer", "of all choices"),
            "total_tokens": schema("integer", "their sum"),
            "prompt_tokens_details": cached,
            "completion_tokens_details": predicted,
        },
        optional=["completion_tokens_details"],
    )


def _timings() -> Fields:
    return _object(
        {
            "cache_n": schema("integer", "prompt tokens that the session had already"),
            "prompt_n": schema("integer", "prompt tokens that were sent"),
            "prompt_ms": schema("number", "milliseconds to the first token"),
            "predicted_n": schema("integer", "tokens of the answer"),
            "predicted_ms": schema("number", "milliseconds from the first token to the end"),
            "draft_n": schema("integer", "drafted tokens that were verified"),
            "draft_n_accepted": schema("integer", "those of them that were accepted"),
            "uplink_bytes": schema("integer", "sent to the base station, in the TCP stream"),
            "downlink_bytes": schema("integer", "received from it"),
            "unverified_n": schema("integer", "tokens at the end of the answer that no base station has verified"),
            "prompt_per_token_ms": schema("number", "`prompt_ms` for each of `prompt_n`"),
            "prompt_per_second": schema("number", "`prompt_n` in each second of `prompt_ms`"),
            "predicted_per_token_ms": schema("number", "`predicted_ms` for each of `predicted_n`"),
            "predicted_per_second": schema("number", "`predicted_n` in each second of `predicted_ms`"),
        }
    )


def _revision() -> Fields:
    """Of a chunk with text that may be unverified; characters are Unicode code points."""
    replaced = "characters at the end of the text so far that the chunk's text replaces; 0 to append it"
    return _object(
        {
            "replaced": schema("integer", replaced),
            "unverified": schema("integer", "characters at the end of the text now that are not verified"),
        }
    )


def _round() -> Fields:
    verified = [origin for origin in Origin if origin is not Origin.UNVERIFIED]
    token = _object(
        {
            "text": schema("string", "that the token adds; empty while a character is incomplete"),
            "token_id": schema("integer", "its id"),
            "origin": schema("string", "how the token was produced", enum=verified),
            "margin": schema(["number", "null"], "of the draft model, in nats, for an accepted token"),
        }
    )
    return _object(
        {
            "device": schema("string", "its name at the base station"),
            "session": schema("integer", "its number"),
            "round": schema("integer", "its number in the session"),
            "mode": schema("string", "what was sent for each drafted token"),
            "draft_len": schema("integer", "most tokens it could draft"),
            "drafted": schema("integer", "tokens that it did draft"),
            "accepted": schema("integer", "those of them that were accepted"),
            "token_id": schema("integer", "the token after the accepted ones"),
            "draft_seconds": schema("number", "time to draft"),
            "reply_seconds": schema("number", "from the Draft to its Verdict"),
            "uplink_bytes": schema("integer", "sent to the base station"),
            "downlink_bytes": schema("integer", "received from it"),
            "tokens": schema("array", "what the round adds to the answer", items=token),
        }
    )


def _object(properties: Mapping[str, Any], optional: Collection[str] = ()) -> Fields:
    """The schema of an object with these fields and no others."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}


def ref(name: str) -> Fields:
    """A reference to the schema of this name."""
    return {"$ref": f"#/components/schemas/{name}"}
