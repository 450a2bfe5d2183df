"""The fields that chat and text completions share: sampling, drafting, length, stops, choices and streaming."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from device.answers.job import AnswerRequest
from device.http.http_fields import (
    EXTENSION_FIELDS,
    IGNORED,
    MAX_CHOICES,
    MAX_STOPS,
    ONLY_VALUES,
    SHARED_FIELDS,
    STREAM_FIELDS,
)
from device.http.request_fields import ANY, Fields, check_inner_names, field
from device.http.sampling_fields import SamplingDefaults, read_sampling
from device.settings import DraftSettings
from device.text.tokenizer import ChatMessage
from protocol.errors import SettingsError
from protocol.messages import Mode, Sampling

_NO_LIMIT = 2**31 - 1
_EXTENSION = "edgedraft"


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
class Streaming:
    """How the answer is returned: streamed or whole, with token counts or without."""

    stream: bool
    include_usage: bool

    @classmethod
    def read(cls, fields: Fields) -> "Streaming":
        """Validate ``stream`` and ``stream_options``.

        Raises:
            SettingsError: a value is not allowed.
        """
        options = field(fields, "stream_options", dict, {}, "an object")
        check_inner_names("stream_options", options, STREAM_FIELDS)
        return cls(
            field(fields, "stream", bool, False, "true or false"),
            field(options, "include_usage", bool, False, "true or false"),
        )


def check_names(fields: Any, known: Collection[str]) -> None:
    """Check that a request is an object, and that no field is unknown that could change the answer.

    Args:
        fields: of the request.
        known: names of fields that are read, besides those of both kinds of request.

    Raises:
        SettingsError: one is, and its value is none that changes nothing.
    """
    if not isinstance(fields, dict):
        raise SettingsError("the request", fields, "a JSON object")
    for name, value in fields.items():
        neutral = ONLY_VALUES.get(name, ())
        if not (name in known or name in SHARED_FIELDS or name in IGNORED or value in (None, *neutral)):
            raise SettingsError(name, value, " or ".join([*map(json.dumps, neutral), "left out"]))


def read_answer(
    fields: Fields,
    prompt: tuple[ChatMessage, ...] | tuple[int, ...] | str,
    defaults: Defaults,
    logprobs: int | None,
) -> AnswerRequest:
    """The request for one answer to a prompt.

    Raises:
        SettingsError: a field has a value that is not allowed.
    """
    extension = _extension(fields)
    rounds = _rounds(extension, logprobs is None)
    unverified = field(extension, "edgedraft.unverified", bool, False, "true or false")
    settings = _settings(fields, extension, defaults, logprobs)
    echo = field(fields, "echo", bool, False, "true or false")
    if unverified and (rounds or echo or logprobs is not None):
        raise SettingsError("edgedraft.unverified", True, "false with logprobs, echo or edgedraft.rounds")
    max_new_tokens = _max_new_tokens(fields, defaults, echo)
    return AnswerRequest(prompt, settings, max_new_tokens, _stops(fields), rounds, echo, unverified=unverified)


def choices_of(fields: Fields, request: AnswerRequest) -> tuple[AnswerRequest, ...]:
    """As many requests as ``n`` asks for, each with the next seed.

    Raises:
        SettingsError: it is not allowed.
    """
    count = field(fields, "n", int, 1, "a whole number")
    if not 1 <= count <= MAX_CHOICES:
        raise SettingsError("n", count, f"1 to {MAX_CHOICES}")
    return tuple(_with_seed(request, index) for index in range(count))


def _with_seed(request: AnswerRequest, index: int) -> AnswerRequest:
    sampling = request.settings.sampling
    sampling = replace(sampling, seed=(sampling.seed + index) % 2**63)
    return replace(request, settings=replace(request.settings, sampling=sampling))


def _extension(fields: Fields) -> Fields:
    """What the request asks of edgedraft alone, each with its full name: ``edgedraft.mode``."""
    extension = field(fields, _EXTENSION, dict, {}, "an object")
    for name, value in extension.items():
        if name not in EXTENSION_FIELDS:
            raise SettingsError(f"{_EXTENSION}.{name}", value, f"left out; fields: {', '.join(EXTENSION_FIELDS)}")
    return {f"{_EXTENSION}.{name}": value for name, value in extension.items()}


def _settings(fields: Fields, extension: Fields, defaults: Defaults, logprobs: int | None) -> DraftSettings:
    mode = field(extension, "edgedraft.mode", str, defaults.mode, f"auto, {', '.join(Mode)}")
    draft_len = field(extension, "edgedraft.draft_len", (str, int), defaults.draft_len, "auto, or 1 or more")
    return defaults.settings(read_sampling(fields, defaults, logprobs), mode, str(draft_len))


def _rounds(extension: Fields, possible: bool) -> bool:
    rounds: bool = field(extension, "edgedraft.rounds", bool, False, "true or false")
    if rounds and not possible:
        raise SettingsError("edgedraft.rounds", rounds, "false, or true without logprobs")
    return rounds


def _max_new_tokens(fields: Fields, defaults: Defaults, echo: bool) -> int:
    name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
    count: int = field(fields, name, int, defaults.max_new_tokens, "a whole number")
    if count < 1 - echo and count != ANY:
        raise SettingsError(name, count, f"1 or more, or {ANY} for no limit; 0 with echo")
    return _NO_LIMIT if count == ANY else count


def _stops(fields: Fields) -> tuple[str, ...]:
    stops = field(fields, "stop", (str, list), [], "a text or a list of them")
    stops = [stops] if isinstance(stops, str) else stops
    if len(stops) > MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise SettingsError("stop", stops, f"up to {MAX_STOPS} texts, none of them empty")
    return tuple(stops)
