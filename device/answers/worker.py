"""One thread that owns the draft model and the link, and answers one request after the other.

A ZeroMQ socket and the draft model's KV cache belong to one thread. Callers
submit a job, and the worker's thread delivers the text. Knows conversations, not HTTP.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial

from device.answers.answer import AnswerStream
from device.answers.answer_delivery import AnswerDelivery
from device.answers.conversations import Conversations
from device.answers.job import AnswerRequest, Finish, Job
from device.answers.job_queue import JobQueue
from device.answers.metrics import Metrics
from device.answers.prompt_logprobs import prompt_logprobs
from device.answers.round_events import RoundEvents
from device.drafting.draft_model import SequenceModel
from device.link.connection import Connection
from device.planning.planners import Planners
from device.session.client import Client
from device.session.round_records import RoundRecord
from device.settings import DraftSettings
from device.text.tokenizer import Tokenizer
from protocol.errors import (
    AdmissionError,
    BusyError,
    CancelledError,
    ClosingError,
    EdgedraftError,
    FaultError,
    LinkError,
    ProtocolError,
    SettingsError,
)

logger = logging.getLogger(__name__)

_ENCODERS = 4
"""Threads that encode prompts."""
_FAILED = "the service is ending after an error; its log has the details"
_STOPPING = "the device's service is shutting down"


class Worker:
    """Answers requests in the order they came, once their prompts are encoded, and keeps the connection alive.

    Args:
        model: the draft model.
        tokenizer: of the same bundle.
        connect: opens a link and greets the base station over it.
        cache_tokens: tokens that the conversations kept may have.
        clock: seconds, monotonic.
        metrics: counters.
        planners: decide how much to draft; None for new ones.
        offline: whether no base station is used.

    Attributes:
        metrics: what the service counts.
        failure: what ended the thread before ``stop``; None while it runs.
        vocab_size: tokens of the draft model.
        tokenizer: of the same bundle.
    """

    def __init__(
        self,
        model: SequenceModel,
        tokenizer: Tokenizer,
        connect: Callable[[], Client],
        cache_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
        planners: Planners | None = None,
        offline: bool = False,
    ) -> None:
        self.vocab_size = model.manifest.vocab_size
        self.metrics = metrics or Metrics()
        self._clock = clock
        self.tokenizer = tokenizer
        self._offline = offline
        self._connection = Connection(connect, clock, offline)
        planners = planners or Planners(model.manifest.target_quality)
        self._conversations = Conversations(model, tokenizer, cache_tokens, planners)
        self._jobs = JobQueue(lambda: self.metrics.count_error(CancelledError()))
        self._encoders = ThreadPoolExecutor(_ENCODERS, "encoder")
        self.metrics.watch(self._jobs.__len__, lambda: self.ready)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._on_failure: Callable[[], None] = lambda: None
        self.failure: BaseException | None = None

    @property
    def ready(self) -> bool:
        """Whether the base station answered recently."""
        return self._connection.alive

    def start(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Start the thread; it calls ``on_failure`` if it ends before ``stop``."""
        self._on_failure = on_failure
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job into the queue, and encode its prompt in another thread: a long one keeps no answer waiting.

        Raises:
            BusyError: the queue is full.
            ClosingError: the service is ending.
        """
        try:
            self._jobs.put(job)
        except (BusyError, ClosingError) as error:
            self.metrics.count_error(error)
            raise
        with suppress(RuntimeError):  # the service has just been closed, which refused the job
            self._encoders.submit(self._encode, job)

    def close(self) -> None:
        """Refuse all further requests and those that wait, and end the answer in progress."""
        self._stopping.set()
        self._jobs.close(_STOPPING)
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def stop(self, seconds: float) -> None:
        """Close, and wait up to ``seconds`` for the thread."""
        self.close()
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._answer_jobs()
        except BaseException as error:
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
                began = self._clock()
                outcome = self._outcome(job)
                self.metrics.count_outcome(outcome, self._clock() - began)
                self._jobs.finish(job, outcome)
        self._conversations.end_all()
        self._connection.close()

    def _keep_alive(self) -> float:
        wait = self._connection.keep_alive()
        if not self._connection.alive:
            self._conversations.forget()
        return wait

    def _outcome(self, job: Job) -> Finish | Exception:
        """Answer the request; an error is delivered to its caller and ends this answer alone."""
        try:
            return self._answer(job)
        except CancelledError as error:
            return ClosingError(_STOPPING) if self._stopping.is_set() else error
        except FaultError as fault:
            if fault.session_id is None:
                self._lose(fault)
            return fault
        except (LinkError, AdmissionError, ProtocolError) as error:
            self._lose(error)
            return error
        except EdgedraftError as error:
            return error
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a library in Rust is no Exception
            logger.exception("an answer failed; the next one begins over a new connection")
            self._conversations.forget()
            self._connection.close()
            return error if isinstance(error, Exception) else RuntimeError(str(error))

    def _lose(self, error: EdgedraftError) -> None:
        """Drop the connection with all conversations: their sessions cannot be closed over a broken link."""
        self._conversations.forget()
        self._connection.lose(error)

    def _answer(self, job: Job) -> Finish:
        needs_base_station = job.request.needs_base_station
        if self._offline and needs_base_station:
            raise SettingsError("logprobs or echo", "given", "left out: this device uses no base station")
        ids, settings = job.prompt_ids.result(), self._settings(job.request)
        client = self._connection.client(may_be_out=not needs_base_station)
        rounds = RoundEvents(job.deliver) if job.request.rounds else None
        delivery = AnswerDelivery(job, self.tokenizer, rounds)
        if job.request.echo:
            with client.cancelled_by(lambda: job.cancelled.is_set() or self._stopping.is_set()):
                self._echo(job, client, ids, delivery)
        if not job.request.max_new_tokens:
            return Finish("length", len(ids), 0)
        show_unverified = None if needs_base_station else delivery.add_unverified
        with (
            self._conversations.for_prompt(client, ids, settings) as conversation,
            client.cancelled_by(lambda: job.cancelled.is_set() or self._stopping.is_set()),
            client.reporting_rounds_to(partial(self._note_round, rounds)),
        ):
            predicted = job.request.prediction
            prediction = self.tokenizer.encode_guess(predicted) if predicted else ()
            stream = conversation.ask(ids, job.request.max_new_tokens, prediction, show_unverified)
            return self._deliver(stream, job, delivery)

    def _settings(self, request: AnswerRequest) -> DraftSettings:
        """The settings of a request; if it must call a tool, with the grammar of a call.

        Raises:
            SettingsError: the model calls no tools.
        """
        if not request.tools.known:
            return request.settings
        tool_format = self.tokenizer.tool_format
        if tool_format is None:
            raise SettingsError("tools", "given", "left out: this model's chat template declares no tools")
        if not request.tools.forced:
            return request.settings
        sampling = replace(
            request.settings.sampling, grammar=tool_format.grammar(request.tools.forced, self.tokenizer.added_tokens)
        )
        return replace(request.settings, sampling=sampling)

    def _encode(self, job: Job) -> None:
        if job.cancelled.is_set():
            return
        try:
            job.prompt_ids.set_result(self._prompt_ids(job.request))
        except BaseException as error:  # noqa: BLE001 - the worker raises it
            job.prompt_ids.set_exception(error)
        self._jobs.note_encoded()

    def _prompt_ids(self, request: AnswerRequest) -> list[int]:
        prompt = request.prompt
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        token_ids = [entry for entry in prompt if isinstance(entry, int)]
        if not token_ids:
            messages = [entry for entry in prompt if not isinstance(entry, int)]
            return self.tokenizer.encode_chat(messages, request.tools.known, request.continue_final)
        if not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            raise SettingsError("prompt", "these tokens", f"token ids from 0 to {self.vocab_size - 1}")
        return token_ids

    def _echo(self, job: Job, client: Client, ids: list[int], delivery: AnswerDelivery) -> None:
        """Deliver the prompt."""
        most = job.request.settings.sampling.logprobs
        if most is None:
            delivery.add_prompt(self.tokenizer.decode(ids))
            return
        logprobs = prompt_logprobs(client, ids, most, lambda: self._conversations.make_room(client))
        texts = self.tokenizer.decode_stream(iter(ids))
        for token_id, told in zip(ids, (None, *logprobs), strict=True):
            delivery.add_prompt(next(texts), token_id, told)
        for rest in texts:  # of a character that the prompt does not end
            delivery.add_prompt(rest)

    def _note_round(self, rounds: RoundEvents | None, record: RoundRecord) -> None:
        self.metrics.count_round(record)
        if rounds:
            rounds.begin(record)

    def _deliver(self, stream: AnswerStream, job: Job, delivery: AnswerDelivery) -> Finish:
        """Deliver the text of an answer up to a stop string."""
        for chunk in stream:
            if chunk.token:
                self._connection.mark_received()
            delivery.add(chunk)
            if delivery.stopped:
                break
        delivery.flush()
        if stream.ended:
            logger.info(
                "%d prompt tokens, %d new tokens, %.1f tokens/s",
                stream.prompt_tokens,
                stream.new_tokens,
                stream.answer.tokens_per_second,
            )
        reason = "stop" if delivery.stopped else stream.answer.finish_reason
        reason = "tool_calls" if delivery.called and reason == "stop" else reason
        predicted = stream.prediction_tokens if job.request.prediction else None
        return Finish(reason, stream.prompt_tokens, stream.new_tokens, predicted, stream.timings)
