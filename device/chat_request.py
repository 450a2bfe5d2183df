"""A request of OpenAI's chat completions API, validated and turned into a request to the worker.

Fields that would change the answer and are not supported are refused; other
unknown fields are ignored.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from device.job import AnswerRequest
from device.settings import DraftSettings
from device.tokenizer import ChatMessage, check_unicode
from protocol.errors import SettingsError
from protocol.messages import Mode, Sampling

Fields: TypeAlias = dict[str, Any]

_ROLES = ("system", "user", "assistant")
_ROLE_NAMES = {"developer": "system"}
"""Roles that OpenAI's clients send under another name."""
_MAX_STOPS = 4
_ANY = -1
"""What clients send as ``seed`` for a random one, as ``max_tokens`` for no limit, and as ``top_k`` for all tokens."""
_NO_LIMIT = 2**31 - 1
_EXTENSION, _EXTENSION_FIELDS = "edgedraft", ("mode", "draft_len", "rounds")
"""The one field that is not of OpenAI's API, and its own fields."""
_UNSUPPORTED: Mapping[str, Sequence[Any]] = {
    "best_of": [1],
    "chat_template_kwargs": [{}],
    "echo": [False],
    "frequency_penalty": [0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "grammar": [""],
    "guided_json": [],
    "ignore_eos": [False],
    "logit_bias": [{}],
    "logprobs": [False],
    "min_p": [0],
    "min_tokens": [0],
    "n": [1],
    "presence_penalty": [0],
    "repetition_penalty": [1],
    "response_format": [{"type": "text"}],
    "stop_token_ids": [[]],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0],
    "typical_p": [1],
}
"""Unsupported fields that change the answer, with the values that do not."""


@dataclass(frozen=True)
class Defaults:
    """Values for fields that a request leaves out.

    ``seed`` None draws a new one for each answer; ``settings`` gives the draft settings for a sampling, a mode and
    a draft length, each of the latter as on the command line.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int | None
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
        stream_options = _field(fields, "stream_options", dict, {}, "an object")
        stream = _field(fields, "stream", bool, False, "true or false")
        extension = _extension(fields)
        request = AnswerRequest(
            _messages(fields),
            _settings(fields, extension, defaults),
            _max_new_tokens(fields, defaults),
            _stops(fields),
            _rounds(extension, stream),
        )
        return cls(request, stream, _field(stream_options, "include_usage", bool, False, "true or false"))


def _messages(fields: Fields) -> tuple[ChatMessage, ...]:
    messages = _field(fields, "messages", list, [], "a list of messages")
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


def _sampling(fields: Fields, defaults: Defaults) -> Sampling:
    """The sampling; greedy answers share one seed, so that a conversation can continue its session."""
    temperature = _number(fields, "temperature", defaults.temperature)
    top_p = _number(fields, "top_p", defaults.top_p)
    top_k = _field(fields, "top_k", int, defaults.top_k, "a whole number")
    seed = _field(fields, "seed", int, defaults.seed, "a whole number")
    if seed in (None, _ANY):
        seed = secrets.randbits(63) if temperature else 0
    return Sampling(temperature, 0 if top_k == _ANY else top_k, top_p, seed)


def _extension(fields: Fields) -> Fields:
    """What the request asks of edgedraft alone, each with its full name: ``edgedraft.mode``."""
    extension = _field(fields, _EXTENSION, dict, {}, "an object")
    for name, value in extension.items():
        if name not in _EXTENSION_FIELDS:
            raise SettingsError(f"{_EXTENSION}.{name}", value, f"left out; fields: {', '.join(_EXTENSION_FIELDS)}")
    return {f"{_EXTENSION}.{name}": value for name, value in extension.items()}


def _settings(fields: Fields, extension: Fields, defaults: Defaults) -> DraftSettings:
    mode = _field(extension, "edgedraft.mode", str, defaults.mode, f"auto, {', '.join(Mode)}")
    draft_len = _field(extension, "edgedraft.draft_len", (str, int), defaults.draft_len, "auto, or 1 or more")
    return defaults.settings(_sampling(fields, defaults), mode, str(draft_len))


def _rounds(extension: Fields, stream: bool) -> bool:
    rounds: bool = _field(extension, "edgedraft.rounds", bool, False, "true or false")
    if rounds and not stream:
        raise SettingsError("edgedraft.rounds", rounds, "false, or true together with stream")
    return rounds


def _max_new_tokens(fields: Fields, defaults: Defaults) -> int:
    name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
    count: int = _field(fields, name, int, defaults.max_new_tokens, "a whole number")
    if count < 1 and count != _ANY:
        raise SettingsError(name, count, f"1 or more, or {_ANY} for no limit")
    return _NO_LIMIT if count == _ANY else count


def _stops(fields: Fields) -> tuple[str, ...]:
    stops = _field(fields, "stop", (str, list), [], "a text or a list of them")
    stops = [stops] if isinstance(stops, str) else stops
    if len(stops) > _MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise SettingsError("stop", stops, f"up to {_MAX_STOPS} texts, none of them empty")
    return tuple(stops)


def _number(fields: Fields, name: str, default: float) -> float:
    value = _field(fields, name, (int, float), default, "a number")
    try:
        return float(value)
    except OverflowError:
        raise SettingsError(name, "a number of that many digits", "a finite number") from None


def _field(fields: Fields, name: str, kind: type | tuple[type, ...], default: Any, allowed: str) -> Any:
    """A field's value; null selects the default, and a boolean is not a number."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise SettingsError(name, value, allowed)
    return value
