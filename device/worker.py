"""One thread that owns the draft model and the link, and answers one request after the other.

A ZeroMQ socket and the draft model's KV cache belong to one thread. Callers
submit a job, and the worker's thread delivers the text. Knows conversations, not HTTP.
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
from device.connection import Connection
from device.draft_model import DraftModel
from device.planner import Planners
from device.settings import DraftSettings
from device.stop_strings import StopStrings
from device.tokenizer import ChatMessage, Tokenizer
from protocol.errors import AdmissionError, BusyError, EdgedraftError, LinkError, ProtocolError

logger = logging.getLogger(__name__)

_MAX_QUEUED = 16
_ENDED = "the service is ending after an error; its log has the details"


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
    """A request in the worker's queue; set ``cancelled`` when nobody waits for the answer any more."""

    request: AnswerRequest
    deliver: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """Answers requests in the order they came, and keeps the connection alive in between.

    Args:
        model: the draft model.
        tokenizer: of the same bundle.
        connect: opens a link and greets the base station over it.
        clock: seconds, monotonic.

    Attributes:
        failure: what ended the thread before ``stop``; None while it runs.
    """

    def __init__(
        self,
        model: DraftModel,
        tokenizer: Tokenizer,
        connect: Callable[[], Client],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._connection = Connection(connect, clock)
        self._planners = Planners(model.manifest.quality)
        self._jobs: queue.Queue[Job | None] = queue.Queue(_MAX_QUEUED)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._conversation: Conversation | None = None
        self._on_failure: Callable[[], None] = lambda: None
        self.failure: Exception | None = None

    @property
    def ready(self) -> bool:
        """Whether the base station answered recently."""
        return self._connection.alive

    def start(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Start the thread; it calls ``on_failure`` if it ends before ``stop``."""
        self._on_failure = on_failure
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            BusyError: the queue is full, or the thread has ended.
        """
        if self.failure is not None:
            raise BusyError(_ENDED)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise BusyError(f"{_MAX_QUEUED} requests are waiting already; retry later") from None

    def stop(self, seconds: float) -> None:
        """Stop after the token being decoded; wait up to ``seconds`` for the thread."""
        self._stopping.set()
        with contextlib.suppress(queue.Full):  # the thread is not idle and need not be woken
            self._jobs.put_nowait(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._answer_jobs()
        except Exception as error:
            logger.exception("the worker failed")
            self.failure = error
            self._refuse_waiting()
            self._on_failure()

    def _refuse_waiting(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                if (job := self._jobs.get_nowait()) is not None:
                    job.deliver(BusyError(_ENDED))

    def _answer_jobs(self) -> None:
        wait = 0.0
        while not self._stopping.is_set():
            try:
                job = self._jobs.get(timeout=wait) if wait else self._jobs.get_nowait()
            except queue.Empty:
                wait = self._keep_alive()
            else:
                if job is not None and not job.cancelled.is_set():
                    job.deliver(self._outcome(job))
        self._end_conversation()
        self._connection.close()

    def _keep_alive(self) -> float:
        wait = self._connection.keep_alive()
        if not self._connection.alive:
            self._conversation = None  # its session went with the connection
        return wait

    def _outcome(self, job: Job) -> Finish | Exception:
        """Answer the request; an error is delivered to its caller and ends this answer alone."""
        try:
            return self._answer(job)
        except (LinkError, AdmissionError, ProtocolError) as error:
            self._conversation = None  # its session cannot be closed over a broken link
            self._connection.lose(error)
            return error
        except EdgedraftError as error:
            self._end_conversation()
            return error
        except Exception as error:
            logger.exception("an answer failed; the next one begins over a new connection")
            self._conversation = None
            self._connection.close()
            return error

    def _answer(self, job: Job) -> Finish:
        request = job.request
        ids = self._tokenizer.encode_chat(request.messages)
        stream = self._conversation_with(request.settings).ask(ids, request.max_new_tokens)
        stops = StopStrings(request.stops)
        for chunk in stream:
            self._connection.mark_received()
            if text := stops.feed(chunk.text):
                job.deliver(text)
            if stops.reached or job.cancelled.is_set() or self._stopping.is_set():
                self._end_conversation()
                return Finish("stop" if stops.reached else "length", len(ids), stream.new_tokens)
        if text := stops.flush():
            job.deliver(text)
        answer = stream.answer
        finish_reason = "stop" if stops.reached else answer.finish_reason
        logger.info(
            "%d prompt tokens, %d new tokens, %.1f tokens/s", len(ids), stream.new_tokens, answer.tokens_per_second
        )
        return Finish(finish_reason, len(ids), stream.new_tokens)

    def _conversation_with(self, settings: DraftSettings) -> Conversation:
        """The current conversation if it accepts these settings, so that only what is new is sent and run."""
        client = self._connection.client()
        if self._conversation is None or not self._conversation.accepts(settings):
            self._end_conversation()
            self._conversation = Conversation(client, self._planners, self._model, self._tokenizer, settings)
        self._conversation.settings = settings
        return self._conversation

    def _end_conversation(self) -> None:
        if self._conversation is not None:
            self._conversation.close()
            self._conversation = None
