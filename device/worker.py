"""One thread that owns the draft model and the link, and answers one request after the other.

A ZeroMQ socket and the draft model's KV cache belong to one thread. Callers
submit a job, and the worker's thread delivers the text. Knows conversations, not HTTP.
"""

import logging
import threading
import time
from collections.abc import Callable

from device.answer import AnswerStream, Conversation
from device.client import Client
from device.connection import Connection
from device.draft_model import DraftModel
from device.job import Finish, Job
from device.job_queue import JobQueue
from device.planner import Planners
from device.settings import DraftSettings
from device.stop_strings import StopStrings
from device.tokenizer import Tokenizer
from protocol.errors import (
    AdmissionError,
    CancelledError,
    ClosingError,
    EdgedraftError,
    LinkError,
    ProtocolError,
)

logger = logging.getLogger(__name__)

_FAILED = "the service is ending after an error; its log has the details"
_STOPPING = "the device's service is shutting down"


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
        self._jobs = JobQueue()
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
            BusyError: the queue is full.
            ClosingError: the service is ending.
        """
        self._jobs.put(job)

    def close(self) -> None:
        """Refuse all further requests and those that wait, and end the answer in progress."""
        self._stopping.set()
        self._jobs.close(_STOPPING)

    def stop(self, seconds: float) -> None:
        """Close, and wait up to ``seconds`` for the thread."""
        self.close()
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._answer_jobs()
        except Exception as error:
            logger.exception("the worker failed")
            self.failure = error
            self._jobs.close(_FAILED)
            self._on_failure()

    def _answer_jobs(self) -> None:
        wait = 0.0
        while not self._stopping.is_set():
            job = self._jobs.get(wait)
            if job is None:
                wait = self._keep_alive()
            else:
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
        except CancelledError as error:
            self._end_unfinished_conversation()
            return ClosingError(_STOPPING) if self._stopping.is_set() else error
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
        ids = self._tokenizer.encode_chat(job.request.messages)
        client = self._connection.client()
        with client.cancelled_by(lambda: job.cancelled.is_set() or self._stopping.is_set()):
            stream = self._conversation_with(client, job.request.settings).ask(ids, job.request.max_new_tokens)
            return self._deliver(stream, job)

    def _deliver(self, stream: AnswerStream, job: Job) -> Finish:
        """Deliver the text of an answer up to a stop string."""
        stops = StopStrings(job.request.stops)
        for chunk in stream:
            self._connection.mark_received()
            if text := stops.feed(chunk.text):
                job.deliver(text)
            if stops.reached:
                self._end_unfinished_conversation()
                return Finish("stop", stream.prompt_tokens, stream.new_tokens)
        if text := stops.flush():
            job.deliver(text)
        answer = stream.answer
        logger.info(
            "%d prompt tokens, %d new tokens, %.1f tokens/s",
            stream.prompt_tokens,
            stream.new_tokens,
            answer.tokens_per_second,
        )
        reason = "stop" if stops.reached else answer.finish_reason
        return Finish(reason, stream.prompt_tokens, stream.new_tokens)

    def _conversation_with(self, client: Client, settings: DraftSettings) -> Conversation:
        """The current conversation if it accepts these settings, so that only what is new is sent and run."""
        if self._conversation is None or not self._conversation.accepts(settings):
            self._end_conversation()
            self._conversation = Conversation(client, self._planners, self._model, self._tokenizer, settings)
        self._conversation.settings = settings
        return self._conversation

    def _end_unfinished_conversation(self) -> None:
        """End the conversation if the base station still has a reply to send."""
        if self._conversation is not None and not self._conversation.ready:
            self._end_conversation()

    def _end_conversation(self) -> None:
        if self._conversation is not None:
            self._conversation.close()
            self._conversation = None
