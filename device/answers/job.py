"""A request to the worker, and what the worker delivers for it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

from device.answers.round_events import AnswerRound
from device.answers.timings import Timings
from device.settings import DraftSettings
from device.text.tentative_text import Revision
from device.text.tokenizer import ChatMessage
from device.text.tool_calls import ToolCall, Tools


@dataclass(frozen=True)
class AnswerRequest:
    """A conversation, a text or tokens to continue; any of the ``stops`` in the text ends the answer.

    With ``rounds`` the answer is delivered round by round, with the origins of its tokens; with ``echo`` the prompt
    comes first, and with log-probabilities if the sampling settings ask for them. With ``continue_final`` the answer
    continues the last message. ``prediction`` is what the answer perhaps is. With ``unverified`` the answer comes in
    revisions, before it is verified.
    """

    prompt: tuple[ChatMessage, ...] | tuple[int, ...] | str
    settings: DraftSettings
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    rounds: bool = False
    echo: bool = False
    tools: Tools = field(default_factory=Tools)
    continue_final: bool = False
    prediction: str = ""
    unverified: bool = False

    @property
    def needs_base_station(self) -> bool:
        """Whether the draft model alone cannot answer it: it asks for the target's log-probabilities, or an echo."""
        return self.echo or self.settings.sampling.logprobs is not None


@dataclass(frozen=True)
class Finish:
    """The end of an answer; ``reason`` is ``stop``, ``length`` or ``tool_calls``, counts are tokens.

    ``prediction_tokens`` are how many of the prediction were accepted, and how many were drafted and rejected; None
    without a prediction.
    """

    reason: str
    prompt_tokens: int
    new_tokens: int
    prediction_tokens: tuple[int, int] | None = None
    timings: Timings = field(default_factory=Timings, compare=False)


@dataclass(frozen=True)
class AnswerPiece:
    """The text that a token adds, and log-probabilities: the token's, and pairs of the likeliest tokens and theirs.

    The first token of a prompt has none. ``offset`` is where the token's own text starts, whose end
    stop strings may hold back.
    """

    text: str
    offset: int
    token: str
    logprob: float | None
    top: tuple[tuple[str, float], ...]


Event: TypeAlias = str | AnswerRound | AnswerPiece | Revision | ToolCall | Finish | Exception
"""What a job delivers: text, rounds, pieces, revisions and calls any number of times, and one of the others once.

Where the service stops, text may follow that.
"""


@dataclass(frozen=True)
class Job:
    """A request to the worker; set ``cancelled`` when nobody waits for the answer any more.

    ``is_first`` is false for further choices of a request, which was accepted as a whole. ``prompt_ids`` are its
    prompt's tokens once they are encoded, or why they cannot be.
    """

    request: AnswerRequest
    deliver: Callable[[Event], None]
    is_first: bool = True
    cancelled: threading.Event = field(default_factory=threading.Event)
    prompt_ids: "Future[list[int]]" = field(default_factory=Future)
