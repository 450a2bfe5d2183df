"""A request to the worker, and what the worker delivers for it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from device.round_events import AnswerRound
from device.settings import DraftSettings
from device.tokenizer import ChatMessage


@dataclass(frozen=True)
class AnswerRequest:
    """A conversation to continue; any of the ``stops`` in the text ends the answer.

    With ``rounds`` the answer is delivered round by round, with the origins of its tokens.
    """

    messages: tuple[ChatMessage, ...]
    settings: DraftSettings
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    rounds: bool = False


@dataclass(frozen=True)
class Finish:
    """The end of an answer; ``reason`` is ``stop`` or ``length``, counts are tokens."""

    reason: str
    prompt_tokens: int
    new_tokens: int


Event: TypeAlias = str | AnswerRound | Finish | Exception
"""What a job delivers: text and rounds any number of times, then one of the others once."""


@dataclass(frozen=True)
class Job:
    """A request to the worker; set ``cancelled`` when nobody waits for the answer any more."""

    request: AnswerRequest
    deliver: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
