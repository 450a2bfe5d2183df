"""A request of OpenAI's chat completions API, validated and turned into requests to the worker.

Fields that are not known are refused.
"""

from dataclasses import dataclass, replace
from typing import Any

from device.answers.job import AnswerRequest
from device.http.answer_fields import Defaults, Streaming, check_names, choices_of, read_answer
from device.http.http_fields import CHAT_FIELDS, MESSAGE_FIELDS
from device.http.request_fields import Fields, check_inner_names, field
from device.http.tool_fields import read_tool_calls, read_tools
from device.text.tokenizer import ChatMessage
from device.text.unicode import check_unicode
from protocol.errors import SettingsError
from protocol.logprobs import MAX_TOP_LOGPROBS

_ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {"developer": "system"}
"""Roles that OpenAI's clients send under another name."""


@dataclass(frozen=True)
class ChatRequest:
    """Requests to the worker, one for each choice, and how the answer is returned."""

    choices: tuple[AnswerRequest, ...]
    streaming: Streaming

    @property
    def per_prompt(self) -> int:
        """How many choices the conversation has."""
        return len(self.choices)

    @classmethod
    def read(cls, fields: Any, defaults: Defaults) -> "ChatRequest":
        """Validate the parsed JSON body of a request.

        Raises:
            SettingsError: a field is missing, has a value that is not allowed, or is not supported.
        """
        check_names(fields, CHAT_FIELDS)
        tools, logprobs, messages = read_tools(fields), _logprobs(fields), _messages(fields)
        request = read_answer(fields, messages, defaults, logprobs)
        continued = _continues(fields, messages[-1])
        request = replace(request, tools=tools, prediction=_prediction(fields), continue_final=continued)
        _check_tools(request)
        return cls(choices_of(fields, request), Streaming.read(fields))


def _prediction(fields: Fields) -> str:
    """What the answer perhaps is; "" where nothing is predicted."""
    prediction = field(fields, "prediction", dict, None, "an object of type content")
    if prediction is None:
        return ""
    if prediction.get("type", "content") != "content":
        raise SettingsError("prediction.type", prediction["type"], "content")
    check_inner_names("prediction", prediction, ("type", "content"))
    return _text("prediction.content", prediction.get("content"))


def _check_tools(request: AnswerRequest) -> None:
    """Check that a request with tools asks for nothing that they exclude.

    Raises:
        SettingsError: it does.
    """
    excludes = request.rounds or request.unverified or request.settings.sampling.logprobs is not None
    if request.tools.known and excludes:
        raise SettingsError("tools", "given", "left out with logprobs, edgedraft.rounds or edgedraft.unverified")
    if request.tools.known and request.settings.sampling.grammar:
        allowed = "left out, or with tool_choice none, beside response_format, grammar or regex"
        raise SettingsError("tools", "given", allowed)


def _logprobs(fields: Fields) -> int | None:
    """How many of the likeliest tokens are told with each token; None without log-probabilities."""
    asked = field(fields, "logprobs", bool, False, "true or false")
    most = field(fields, "top_logprobs", int, 0, "a whole number")
    if not 0 <= most <= (MAX_TOP_LOGPROBS if asked else 0):
        raise SettingsError("top_logprobs", most, f"0, or up to {MAX_TOP_LOGPROBS} together with logprobs")
    return most if asked else None


def _messages(fields: Fields) -> tuple[ChatMessage, ...]:
    messages = field(fields, "messages", list, [], "a list of messages")
    if not messages:
        raise SettingsError("messages", messages, "at least one message")
    return tuple(_message(f"messages[{index}]", message) for index, message in enumerate(messages))


def _continues(fields: Fields, final: ChatMessage) -> bool:
    """Whether the answer continues the final message."""
    continued: bool = field(fields, "continue_final_message", bool, False, "true or false")
    if continued and (final["role"] != "assistant" or "tool_calls" in final):
        raise SettingsError("continue_final_message", True, "false, or true after an assistant's text")
    prompted = field(fields, "add_generation_prompt", bool, not continued, "true or false")
    if prompted == continued:
        raise SettingsError("add_generation_prompt", prompted, "true, or false with continue_final_message")
    return continued


def _message(name: str, message: Any) -> ChatMessage:
    role = message.get("role") if isinstance(message, dict) else None
    role = _ROLE_NAMES.get(role, role) if isinstance(role, str) else None
    if role not in _ROLES:
        raise SettingsError(name, message, f"an object with role {', '.join(_ROLES)} and content")
    check_inner_names(name, message, MESSAGE_FIELDS)
    content = message.get("content")
    calls = read_tool_calls(name, message) if role == "assistant" else []
    if content is None and role == "assistant":  # of an answer that only called tools
        content = ""
    read: ChatMessage = {"role": role, "content": _text(f"{name}.content", content)}
    if calls:
        read["tool_calls"] = calls
    if role == "tool":
        read["tool_call_id"] = field(message, "tool_call_id", str, "", "a text")
        read["name"] = field(message, "name", str, "", "a text")
    return read


def _text(name: str, content: Any) -> str:
    """A text, or the texts of several parts."""
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise SettingsError(name, content, "text, or a list of parts of type text")
    check_unicode(name, content)
    return content


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
