"""Errors as OpenAI's API sends them: a status, and ``message``, ``type``, ``param`` and ``code`` in JSON."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from protocol.errors import (
    BundleError,
    BusyError,
    ContextLengthError,
    EdgedraftError,
    FaultError,
    GrammarError,
    SettingsError,
    TransientGrammarError,
)

_INVALID, _RATE, _SERVER = "invalid_request_error", "rate_limit_exceeded", "server_error"
_KINDS: Mapping[type[EdgedraftError], tuple[int, str, str | None]] = {
    ContextLengthError: (400, _INVALID, "context_length_exceeded"),
    SettingsError: (400, _INVALID, "invalid_value"),
    BundleError: (400, _INVALID, "invalid_value"),  # the chat template cannot render the conversation
    GrammarError: (400, _INVALID, "invalid_grammar"),
    TransientGrammarError: (503, _SERVER, None),
    BusyError: (429, _RATE, _RATE),
    EdgedraftError: (503, _SERVER, None),
}
"""Status, type and code of each error and of those derived from it; None stands for the error's own code."""
_PARAMS = {
    "mode": "edgedraft.mode",
    "draft-len": "edgedraft.draft_len",
    "the request": None,
}
"""Fields of the request that a setting of another name comes from."""
_PROMPT = ("prompt", "conversation")
"""What errors call the prompt, whichever field of the request has it."""
_LONGEST_VALUE = 100


class HttpError(Exception):
    """An error with all that its response holds."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        kind: str = _INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        param = None if param is None else _printable(param)
        self.fields: dict[str, Any] = {
            "error": {"message": _printable(message), "type": kind, "param": param, "code": code}
        }
        self._headers = headers

    @classmethod
    def of(cls, error: Exception, prompt_field: str = "prompt") -> "HttpError":
        """The error as a client is told of it; what was not foreseen is told without details.

        Args:
            error: of any kind.
            prompt_field: the field of the request that has the prompt.
        """
        if isinstance(error, HttpError):
            return error
        if isinstance(error, HTTPException):
            kind = _INVALID if error.status_code < 500 else _SERVER
            return cls(error.status_code, error.detail, kind=kind, headers=error.headers)
        if not isinstance(error, EdgedraftError):
            return cls(500, "internal error; the log of the device's service has the details", kind=_SERVER)
        if isinstance(error, FaultError) and error.fault_code == GrammarError.code and not error.retry_seconds:
            return cls.of(GrammarError(error.text))
        status, kind, code = next(_KINDS[base] for base in type(error).__mro__ if base in _KINDS)
        own_code = error.fault_code if isinstance(error, FaultError) else error.code
        headers = {"Retry-After": str(error.retry_seconds)} if error.retry_seconds else None
        return cls(status, _message(error), code or own_code, _param(error, prompt_field), kind, headers)

    @classmethod
    def overloaded(cls, message: str) -> "HttpError":
        """The service cannot take another connection now."""
        return cls(503, message, BusyError.code, kind=_SERVER)

    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.fields, self.status, self._headers)


def shown(value: object) -> str:
    """A value as JSON writes it, shortened."""
    text = _printable(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _printable(text: str) -> str:
    """A text as UTF-8 can write it: halves of surrogate pairs are escaped."""
    return text.encode(errors="backslashreplace").decode()


def _message(error: EdgedraftError) -> str:
    if isinstance(error, ContextLengthError):  # LiteLLM knows it by "prompt is too long"
        return f"the {error.name} is too long: {error.value}; allowed: {error.allowed}"
    if isinstance(error, SettingsError):
        return f"{error.name} is {shown(error.value)}; allowed: {error.allowed}"
    return str(error)


def _param(error: EdgedraftError, prompt_field: str) -> str | None:
    if isinstance(error, BundleError):
        return prompt_field
    if not isinstance(error, SettingsError):
        return None
    return prompt_field if error.name in _PROMPT else _PARAMS.get(error.name, error.name)
