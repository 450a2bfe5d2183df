"""One thread that owns the draft model and the link, and answers one question after the other.

A ZeroMQ socket and the cache of a draft model belong to one thread. Whoever wants
an answer leaves a question and is handed text, in the worker's thread. Knows
conversations, not HTTP.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from device.answer import Conversation
from device.client import Client
from device.draft_model import DraftModel
from device.link import Link
from device.session import DraftSettings
from device.stop_strings import StopStrings
from device.tokenizer import ChatMessage, Tokenizer
from protocol.errors import AdmissionError, BusyError, EdgedraftError, LinkError, ProtocolError

logger = logging.getLogger(__name__)

_MAX_WAITING = 16
_GREETING_SECONDS = 10.0
_RETRY_SECONDS = 3.0
_GREETING_PATIENCE = 5.0
_FRESH_SECONDS = 2.0
_RECENT_SECONDS = _GREETING_SECONDS + _GREETING_PATIENCE


@dataclass(frozen=True)
class Question:
    """A conversation to be continued, and how; one of ``stops`` in the text ends the answer."""

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
"""What an asker is handed: text any number of times, then either of the others once."""


@dataclass(frozen=True)
class Job:
    """A question on its way through the worker; set ``abandoned`` where nobody waits for the answer any more."""

    question: Question
    deliver: Callable[[Event], None]
    abandoned: threading.Event = field(default_factory=threading.Event)


class Worker:
    """Answers questions in the order in which they came, and greets the base station in between.

    Args:
        model: the draft model.
        tokenizer: of the same bundle.
        connect: makes a link and greets the base station over it.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        model: DraftModel,
        tokenizer: Tokenizer,
        connect: Callable[[], tuple[Link, Client]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._connect = connect
        self._clock = clock
        self._jobs: queue.Queue[Job | None] = queue.Queue(_MAX_WAITING)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._contact: tuple[Link, Client] | None = None
        self._conversation: Conversation | None = None
        self._heard_at = -_RECENT_SECONDS
        self._lost = False

    @property
    def ready(self) -> bool:
        """Whether the base station was heard recently."""
        return self._contact is not None and self._clock() - self._heard_at < _RECENT_SECONDS

    def start(self) -> None:
        """Begin to greet and to answer."""
        self._thread.start()

    def ask(self, job: Job) -> None:
        """Have a question answered when its turn comes.

        Raises:
            BusyError: too many wait already.
        """
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise BusyError(f"{_MAX_WAITING} questions wait already; ask again later") from None

    def stop(self, seconds: float) -> None:
        """End after the token under way, and wait up to ``seconds`` for it."""
        self._stopping.set()
        with contextlib.suppress(queue.Full):  # then it need not be woken
            self._jobs.put_nowait(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        wait = 0.0
        while not self._stopping.is_set():
            try:
                job = self._jobs.get(timeout=wait) if wait else self._jobs.get_nowait()
            except queue.Empty:
                wait = self._keep_in_touch()
            else:
                if job is not None and not job.abandoned.is_set():
                    job.deliver(self._outcome(job))
        self._hang_up()

    def _keep_in_touch(self) -> float:
        """Greet the base station; gives the seconds until it should be done again."""
        try:
            self._client()
        except EdgedraftError:
            return _RETRY_SECONDS
        return _GREETING_SECONDS

    def _outcome(self, job: Job) -> Finish | Exception:
        """Answer; whatever goes wrong is the asker's to know, and ends nothing but this answer."""
        try:
            return self._answer(job)
        except (LinkError, AdmissionError, ProtocolError) as error:
            self._lose(error)
            return error
        except Exception as error:  # noqa: BLE001 - handed to the asker, who raises it
            self._end_conversation()
            return error

    def _answer(self, job: Job) -> Finish:
        question = job.question
        ids = self._tokenizer.encode_chat(question.messages)
        stream = self._conversation_of(question.settings).ask(ids, question.max_new_tokens)
        stops = StopStrings(question.stops)
        new_tokens = 0
        for piece in stream:
            self._heard_at = self._clock()
            new_tokens += 1
            if text := stops.pass_on(piece.text):
                job.deliver(text)
            if stops.reached or job.abandoned.is_set() or self._stopping.is_set():
                self._end_conversation()
                return Finish("stop" if stops.reached else "length", len(ids), new_tokens)
        if text := stops.rest():
            job.deliver(text)
        answer = stream.answer
        logger.info("answered %d tokens with %d, %.1f a second", len(ids), new_tokens, answer.tokens_per_second)
        return Finish(answer.finish_reason, len(ids), new_tokens)

    def _conversation_of(self, settings: DraftSettings) -> Conversation:
        """The conversation so far where the settings are the same: then only what is new is sent and run."""
        link, client = self._client()
        if self._conversation is None or self._conversation.settings != settings:
            self._end_conversation()
            self._conversation = Conversation(link, client, self._model, self._tokenizer, settings)
        return self._conversation

    def _client(self) -> tuple[Link, Client]:
        """The base station, heard a moment ago.

        Raises:
            LinkError: it does not answer.
            AdmissionError: the two ends do not know each other's keys.
            FaultError: it refuses the draft model.
        """
        try:
            if self._contact is None:
                self._contact = self._connect()
            elif self._clock() - self._heard_at >= _FRESH_SECONDS:
                self._contact[1].greet(_GREETING_PATIENCE)
            else:
                return self._contact
        except EdgedraftError as error:
            self._lose(error)
            raise
        self._heard_at = self._clock()
        if self._lost:
            logger.info("the base station answers again")
        self._lost = False
        return self._contact

    def _lose(self, error: EdgedraftError) -> None:
        if not self._lost:
            logger.warning("%s", error)
        self._lost = True
        self._conversation = None  # the link that it would be closed over is not to be trusted
        self._hang_up()

    def _hang_up(self) -> None:
        self._end_conversation()
        if self._contact is not None:
            self._contact[0].close()
            self._contact = None

    def _end_conversation(self) -> None:
        if self._conversation is not None:
            self._conversation.close()
            self._conversation = None
