"""A request to the worker, and what the worker delivers for it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from device.settings import DraftSettings
from device.tokenizer import ChatMessage


@dataclass(frozen=True)
class AnswerRequest:
    """A conversation to continue; any of the ``stops`` in the text ends the answer."""

    messages: tuple[ChatMessage, ...]
    settings: DraftSettings
    max_new_tokens: int
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The end of an answer; ``reason`` is ``stop`` or ``length``, counts are tokens."""

    reason: str
    prompt_tokens: int
    new_tokens: int


Event: TypeAlias = str | Finish | Exception
"""What a job delivers: text any number of times, then one of the others once."""


@dataclass(frozen=True)
class Job:
    """A request to the worker; set ``cancelled`` when nobody waits for the answer any more."""

    request: AnswerRequest
    deliver: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
