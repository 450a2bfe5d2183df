"""A client that leaves frees the queue, the draft model and the link at once; the next answer is exact."""

import asyncio
import json
import queue
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import pytest

from device.answers.job import AnswerRequest, Event, Finish, Job
from device.answers.job_queue import JobQueue
from device.answers.worker import Worker
from device.drafting.draft_model import DraftModel
from device.http.service import Access, application
from device.session.client import Client
from device.settings import DraftSettings
from device.text.tokenizer import ChatMessage, Tokenizer
from protocol.errors import CancelledError, ClosingError, RevokedError
from protocol.messages import Close, Draft, Message, Mode, Opened, Sampling, Verdict
from tests.fakes import PROMPT, FakeDraftModel, target_alone
from tests.link_pair import MemoryTransport, RefusingTransport, join
from tests.number_service import (
    DEFAULTS,
    DRAFT,
    FIELDS,
    TARGET,
    NumberTokenizer,
    new_station,
    text_of,
)

LONG_PROMPT = PROMPT * 100
GREEDY = DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=4)
WAIT_SECONDS = 20


class WatchedDraftModel(FakeDraftModel):
    """Calls ``watch[0]`` with the number of forward passes so far, those of its forks included."""

    @cached_property
    def watch(self) -> list[Callable[[int], object]]:
        return [lambda _: None]

    def forward(self, token_ids: Any) -> Any:
        logits = super().forward(token_ids)
        self.watch[0](len(self.passes))
        return logits


def watched_model() -> WatchedDraftModel:
    model = cast(WatchedDraftModel, WatchedDraftModel.make(DRAFT))
    assert model.watch
    return model


def new_worker(transport: MemoryTransport, model: WatchedDraftModel) -> Worker:
    def connect() -> Client:
        return join(transport.station, cast(DraftModel, model), transport)[0]

    return Worker(cast(DraftModel, model), cast(Tokenizer, NumberTokenizer()), connect, 4096, lambda: 0.0)


class Answer:
    """A job's events."""

    def __init__(self, prompt: list[int], max_new_tokens: int = 12, settings: DraftSettings = GREEDY) -> None:
        self.text, self.ends = "", 0
        self._end: Finish | Exception | None = None
        self._ended = threading.Event()
        message: ChatMessage = {"role": "user", "content": text_of(prompt)}
        request = AnswerRequest((message,), settings, max_new_tokens)
        self.job = Job(request, self._take)

    def cancel(self) -> None:
        self.job.cancelled.set()

    def end(self) -> Finish | Exception | None:
        assert self._ended.wait(WAIT_SECONDS)
        return self._end

    def _take(self, event: Event) -> None:
        if isinstance(event, str):
            self.text += event
        elif isinstance(event, Finish | Exception):
            self._end, self.ends = event, self.ends + 1
            self._ended.set()


def check_next_answer(worker: Worker, prompt: list[int]) -> None:
    """The next answer is what a new pair gives."""
    answer = Answer(prompt)
    worker.submit(answer.job)
    assert isinstance(answer.end(), Finish)
    assert answer.text == text_of(target_alone(TARGET, prompt, 12))


def test_an_abandoned_request_gives_its_place_in_the_queue_to_the_next() -> None:
    worker = new_worker(MemoryTransport(new_station()), watched_model())
    for _ in range(40):
        abandoned = Answer(PROMPT)
        worker.submit(abandoned.job)
        abandoned.cancel()
    worker.start()
    check_next_answer(worker, PROMPT)
    worker.stop(5)


@pytest.mark.parametrize("next_prompt", [LONG_PROMPT, PROMPT], ids=["the same prompt", "another prompt"])
def test_an_abandoned_prompt_stops_the_draft_model_between_two_chunks(next_prompt: list[int]) -> None:
    model = watched_model()
    worker = new_worker(MemoryTransport(new_station()), model)
    abandoned = Answer(LONG_PROMPT)
    model.watch[0] = lambda count: abandoned.cancel() if count == 2 else None
    worker.submit(abandoned.job)
    worker.start()
    assert isinstance(abandoned.end(), CancelledError)
    assert (abandoned.text, len(model.passes)) == ("", 2)
    assert sum(model.passes) < len(LONG_PROMPT) / 2
    check_next_answer(worker, next_prompt)
    worker.stop(5)


def test_an_abandoned_turn_of_a_conversation_keeps_what_was_run() -> None:
    model = watched_model()
    worker = new_worker(MemoryTransport(new_station()), model)
    worker.start()
    check_next_answer(worker, PROMPT)
    turn = [*PROMPT, *target_alone(TARGET, PROMPT, 12), *LONG_PROMPT]
    abandoned, before = Answer(turn), len(model.passes)
    model.watch[0] = lambda count: abandoned.cancel() if count == before + 2 else None
    worker.submit(abandoned.job)
    assert isinstance(abandoned.end(), CancelledError)
    check_next_answer(worker, turn)
    worker.stop(5)
    assert sum(model.passes[before:]) < len(turn) + 40


@pytest.mark.parametrize(
    ("reply", "last_sent"), [(Opened, Close), (Verdict, Draft)], ids=["closes its session", "keeps its session"]
)
def test_an_abandoned_request_does_not_wait_for_the_base_station(
    reply: type[Message], last_sent: type[Message]
) -> None:
    abandoned = Answer(PROMPT)
    sent: list[str] = []

    def lose_while_abandoned(message: Message) -> int:
        lost = isinstance(message, reply) and not abandoned.job.cancelled.is_set()
        if lost:
            abandoned.cancel()
        return int(not lost)

    def note(message: Message) -> int:
        sent.append(type(message).__name__)
        return 1

    transport = MemoryTransport(new_station(), up=note, down=lose_while_abandoned)
    worker = new_worker(transport, watched_model())
    worker.submit(abandoned.job)
    worker.start()
    assert isinstance(abandoned.end(), CancelledError)
    assert transport.now < 1
    assert sent[-1] == last_sent.__name__
    check_next_answer(worker, PROMPT)
    worker.stop(5)


def test_an_abandoned_request_does_not_wait_for_room_at_the_base_station() -> None:
    abandoned = Answer(PROMPT)

    class LeavingTransport(RefusingTransport):
        def receive(self, timeout: float) -> bytes | None:
            if self.refused_at:
                abandoned.cancel()
            return super().receive(timeout)

    transport = LeavingTransport(new_station())
    transport.opens_at, transport.retry_seconds = 20.0, 30
    worker = new_worker(transport, watched_model())
    worker.submit(abandoned.job)
    worker.start()
    assert isinstance(abandoned.end(), CancelledError)
    assert transport.now < 1
    check_next_answer(worker, PROMPT)
    worker.stop(5)


@pytest.mark.parametrize("stop_after", range(1, 12))
@pytest.mark.parametrize("mode", [Mode.IDS, Mode.TARGET])
def test_an_answer_abandoned_at_any_message_leaves_the_next_exact(mode: Mode, stop_after: int) -> None:
    abandoned = Answer(PROMPT, 40, DraftSettings(mode, Sampling(), uplink_k=1, draft_len=4))
    received: list[Message] = []

    def count(message: Message) -> int:
        received.append(message)
        if len(received) == stop_after:
            abandoned.cancel()
        return 1

    worker = new_worker(MemoryTransport(new_station(), down=count), watched_model())
    worker.submit(abandoned.job)
    worker.start()
    abandoned.end()
    check_next_answer(worker, [*PROMPT, *target_alone(TARGET, PROMPT, 3), 9])
    worker.stop(5)


@pytest.mark.parametrize("notices", ["2.3", "2.4"], ids=["the response notices", "the answer notices"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(stream: bool, notices: str) -> None:
    model = watched_model()
    worker = new_worker(MemoryTransport(new_station()), model)
    answering, left = threading.Event(), threading.Event()

    def run_slowly_until_the_client_has_left(count: int) -> None:
        if count == 12:
            answering.set()
        if count >= 12:
            left.wait(0.05)

    model.watch[0] = run_slowly_until_the_client_has_left
    worker.start()
    asyncio.run(post_and_leave(worker, FIELDS | {"max_tokens": 200, "stream": stream}, answering, notices))
    left.set()
    check_next_answer(worker, PROMPT)
    worker.stop(5)
    assert len(model.passes) < 40


async def post_and_leave(worker: Worker, fields: object, answering: threading.Event, spec_version: str) -> None:
    """Send a request and leave during its answer; return when the application has ended.

    Before version 2.4 of ASGI, Starlette itself listens for the end of the connection while it streams.
    """
    headers = [(b"host", b"testserver"), (b"content-type", b"application/json")]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
    scope |= {"query_string": b"", "asgi": {"spec_version": spec_version}}
    messages = [{"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await asyncio.to_thread(answering.wait, WAIT_SECONDS)
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    await application(worker, "numbers", DEFAULTS, Access())(scope, receive, send)


def test_requests_are_refused_once_the_service_stops() -> None:
    worker = new_worker(MemoryTransport(new_station()), watched_model())
    waiting, late = Answer(PROMPT), Answer(PROMPT)
    worker.submit(waiting.job)
    worker.close()
    assert isinstance(waiting.end(), ClosingError)
    with pytest.raises(ClosingError):
        worker.submit(late.job)


def test_the_service_stops_cleanly_where_the_base_station_refuses_the_connection() -> None:
    class RevokedTransport(MemoryTransport):
        revoked = closed = False

        def send(self, frame: bytes) -> None:
            if self.revoked:
                raise RevokedError("the key was revoked")
            super().send(frame)

        def close(self) -> None:
            self.closed = True

    transport = RevokedTransport(new_station())
    worker = new_worker(transport, watched_model())
    worker.start()
    for first in (3, 4):  # conversations that are kept
        check_next_answer(worker, [first, *PROMPT])
    transport.revoked = True
    worker.stop(5)
    assert (worker.failure, transport.closed) == (None, True)


def test_an_answer_in_progress_ends_once_when_the_service_stops() -> None:
    model = watched_model()
    worker = new_worker(MemoryTransport(new_station()), model)
    model.watch[0] = lambda count: worker.close() if count == 5 else None
    refused = Answer(PROMPT, 200)
    worker.submit(refused.job)
    worker.start()
    assert isinstance(refused.end(), ClosingError)
    worker.stop(WAIT_SECONDS)
    assert refused.ends == 1


def test_a_request_that_comes_while_the_service_closes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, late, put = new_worker(MemoryTransport(new_station()), watched_model()), Answer(PROMPT), JobQueue.put

    def put_and_close(jobs: JobQueue, job: Job) -> None:
        put(jobs, job)
        worker.close()

    monkeypatch.setattr(JobQueue, "put", put_and_close)
    worker.submit(late.job)
    assert isinstance(late.end(), ClosingError)


def test_a_prompt_that_takes_long_to_encode_keeps_no_other_request_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, released = NumberTokenizer.encode, threading.Event()

    def slowly(tokenizer: NumberTokenizer, text: str) -> list[int]:
        if text.startswith("9"):
            assert released.wait(60)
        return encode(tokenizer, text)

    monkeypatch.setattr(NumberTokenizer, "encode", slowly)
    worker = new_worker(MemoryTransport(new_station()), watched_model())
    worker.start()
    try:
        outcomes: queue.Queue[tuple[str, Event]] = queue.Queue()
        for text in ("9 1 4", "3 1 4"):
            request = AnswerRequest(text, GREEDY, 3)
            worker.submit(Job(request, lambda event, text=text: outcomes.put((text, event))))  # type: ignore[misc]
        finished = [outcomes.get(timeout=60)]
        while not isinstance(finished[-1][1], Finish):
            finished.append(outcomes.get(timeout=60))
        assert {text for text, _ in finished} == {"3 1 4"}
        released.set()
        while not isinstance(finished[-1][1], Finish) or finished[-1][0] != "9 1 4":
            finished.append(outcomes.get(timeout=60))
    finally:
        released.set()
        worker.stop(5)
