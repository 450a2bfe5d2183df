"""A request of OpenAI's chat completions API, validated and turned into a request to the worker.

Fields that would change the answer and are not supported are refused; other
unknown fields are ignored.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from device.job import AnswerRequest
from device.request_fields import ANY, Fields, field
from device.sampling_fields import SamplingDefaults, read_sampling
from device.settings import DraftSettings
from device.tokenizer import ChatMessage, check_unicode
from protocol.errors import SettingsError
from protocol.messages import Mode, Sampling

_ROLES = ("system", "user", "assistant")
_ROLE_NAMES = {"developer": "system"}
"""Roles that OpenAI's clients send under another name."""
_MAX_STOPS = 4
_NO_LIMIT = 2**31 - 1
_EXTENSION, _EXTENSION_FIELDS = "edgedraft", ("mode", "draft_len", "rounds")
"""The one field that is not of OpenAI's API, and its own fields."""
_UNSUPPORTED: Mapping[str, Sequence[Any]] = {
    "best_of": [1],
    "chat_template_kwargs": [{}],
    "echo": [False],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "guided_json": [],
    "logprobs": [False],
    "n": [1],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0],
    "typical_p": [1],
}
"""Unsupported fields that change the answer, with the values that do not."""


@dataclass(frozen=True)
class Defaults(SamplingDefaults):
    """Values for fields that a request leaves out.

    ``settings`` gives the draft settings for a sampling, a mode and
    a draft length, each of the latter as on the command line.
    """

    max_new_tokens: int
    mode: str
    draft_len: str
    settings: Callable[[Sampling, str, str], DraftSettings]


@dataclass(frozen=True)
class ChatRequest:
    """A request to the worker, and how the answer is returned: streamed or whole, with token counts or without."""

    request: AnswerRequest
    stream: bool
    include_usage: bool

    @classmethod
    def read(cls, fields: Any, defaults: Defaults) -> "ChatRequest":
        """Validate the parsed JSON body of a request.

        Raises:
            SettingsError: a field is missing, has a value that is not allowed, or is not supported.
        """
        if not isinstance(fields, dict):
            raise SettingsError("the request", fields, "a JSON object")
        for name, neutral in _UNSUPPORTED.items():
            if fields.get(name) not in (None, *neutral):
                raise SettingsError(name, fields[name], " or ".join([*map(json.dumps, neutral), "left out"]))
        stream_options = field(fields, "stream_options", dict, {}, "an object")
        stream = field(fields, "stream", bool, False, "true or false")
        extension = _extension(fields)
        request = AnswerRequest(
            _messages(fields),
            _settings(fields, extension, defaults),
            _max_new_tokens(fields, defaults),
            _stops(fields),
            _rounds(extension, stream),
        )
        return cls(request, stream, field(stream_options, "include_usage", bool, False, "true or false"))


def _messages(fields: Fields) -> tuple[ChatMessage, ...]:
    messages = field(fields, "messages", list, [], "a list of messages")
    if not messages:
        raise SettingsError("messages", messages, "at least one message")
    return tuple(_message(f"messages[{index}]", message) for index, message in enumerate(messages))


def _message(name: str, message: Any) -> ChatMessage:
    role = message.get("role") if isinstance(message, dict) else None
    role = _ROLE_NAMES.get(role, role) if isinstance(role, str) else None
    if role not in _ROLES:
        raise SettingsError(name, message, f"an object with role {', '.join(_ROLES)} and content")
    content = message.get("content")
    if content is None and role == "assistant":  # of an answer that only called tools
        content = ""
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise SettingsError(f"{name}.content", content, "text, or a list of parts of type text")
    check_unicode(f"{name}.content", content)
    return {"role": role, "content": content}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _extension(fields: Fields) -> Fields:
    """What the request asks of edgedraft alone, each with its full name: ``edgedraft.mode``."""
    extension = field(fields, _EXTENSION, dict, {}, "an object")
    for name, value in extension.items():
        if name not in _EXTENSION_FIELDS:
            raise SettingsError(f"{_EXTENSION}.{name}", value, f"left out; fields: {', '.join(_EXTENSION_FIELDS)}")
    return {f"{_EXTENSION}.{name}": value for name, value in extension.items()}


def _settings(fields: Fields, extension: Fields, defaults: Defaults) -> DraftSettings:
    mode = field(extension, "edgedraft.mode", str, defaults.mode, f"auto, {', '.join(Mode)}")
    draft_len = field(extension, "edgedraft.draft_len", (str, int), defaults.draft_len, "auto, or 1 or more")
    return defaults.settings(read_sampling(fields, defaults), mode, str(draft_len))


def _rounds(extension: Fields, stream: bool) -> bool:
    rounds: bool = field(extension, "edgedraft.rounds", bool, False, "true or false")
    if rounds and not stream:
        raise SettingsError("edgedraft.rounds", rounds, "false, or true together with stream")
    return rounds


def _max_new_tokens(fields: Fields, defaults: Defaults) -> int:
    name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
    count: int = field(fields, name, int, defaults.max_new_tokens, "a whole number")
    if count < 1 and count != ANY:
        raise SettingsError(name, count, f"1 or more, or {ANY} for no limit")
    return _NO_LIMIT if count == ANY else count


def _stops(fields: Fields) -> tuple[str, ...]:
    stops = field(fields, "stop", (str, list), [], "a text or a list of them")
    stops = [stops] if isinstance(stops, str) else stops
    if len(stops) > _MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise SettingsError("stop", stops, f"up to {_MAX_STOPS} texts, none of them empty")
    return tuple(stops)
