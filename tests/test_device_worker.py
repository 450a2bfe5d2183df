"""The worker: jobs in order, cancelled and refused ones, and whether it is ready."""

import threading

import pytest
from starlette.testclient import TestClient

from device.answers.job import AnswerRequest, Event, Finish, Job
from device.answers.worker import Worker
from device.http.service import Access, application
from device.text.tokenizer import ChatMessage
from protocol.errors import BusyError
from protocol.messages import Sampling
from tests.fakes import PROMPT, target_alone
from tests.number_service import DEFAULTS, TARGET, complete, new_station, new_worker, settings, text_of


class Events:
    """Collects what a job delivers, and cancels it after ``cancel_after`` texts."""

    def __init__(self, cancel_after: int | None = None) -> None:
        self.texts: list[str] = []
        self._cancel_after = cancel_after
        self._end: Finish | Exception | None = None
        self._ended = threading.Event()
        self.job: Job | None = None

    def deliver(self, event: Event) -> None:
        if isinstance(event, str):
            self.texts.append(event)
        elif isinstance(event, Finish | Exception):
            self._end = event
            self._ended.set()
        if len(self.texts) == self._cancel_after:
            assert self.job is not None
            self.job.cancelled.set()

    def end(self) -> Finish | Exception | None:
        assert self._ended.wait(10)
        return self._end


def submit(worker: Worker, max_new_tokens: int, cancel_after: int | None = None) -> Events:
    events = Events(cancel_after)
    message: ChatMessage = {"role": "user", "content": "3 1 4 1 5"}
    events.job = Job(AnswerRequest((message,), settings(Sampling()), max_new_tokens), events.deliver)
    worker.submit(events.job)
    return events


def test_worker_is_ready_if_the_base_station_answered_recently() -> None:
    now = 0.0
    worker = new_worker(new_station(), clock=lambda: now)
    readiness = [worker.ready]
    events = submit(worker, max_new_tokens=1)
    worker.start()
    events.end()
    now = 14.0
    readiness.append(worker.ready)
    now = 16.0
    readiness.append(worker.ready)
    worker.stop(5)
    assert readiness == [False, True, False]


def test_jobs_are_answered_in_order() -> None:
    worker = new_worker(new_station())
    submitted = [submit(worker, count) for count in (9, 1, 5)]
    worker.start()
    assert [events.end() for events in submitted] == [Finish("length", 5, count) for count in (9, 1, 5)]
    worker.stop(5)


def test_cancelled_job_is_not_finished() -> None:
    worker = new_worker(new_station())
    cancelled, finished = submit(worker, 500, cancel_after=3), submit(worker, 12)
    worker.start()
    finished.end()
    worker.stop(5)
    assert len(cancelled.texts) == 3
    assert "".join(finished.texts) == text_of(target_alone(TARGET, PROMPT, 12))


def test_job_is_refused_when_the_queue_is_full() -> None:
    worker = new_worker(new_station())
    for _ in range(16):
        submit(worker, 1)
    with pytest.raises(BusyError, match="16 requests are waiting"):
        submit(worker, 1)
    client = TestClient(application(worker, "numbers", DEFAULTS, Access()))
    response = complete(client)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
