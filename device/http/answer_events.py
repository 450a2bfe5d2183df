"""The events of answers, one after the other, handed from the worker's thread to the event loop."""

import asyncio
import contextlib
from typing import TypeAlias

from starlette.requests import ClientDisconnect, Request

from device.answers.job import AnswerPiece, AnswerRequest, Event, Finish, Job
from device.answers.round_events import AnswerRound
from device.answers.worker import Worker
from device.http.http_errors import HttpError
from device.text.tentative_text import Revision
from device.text.tool_calls import ToolCall
from protocol.errors import EdgedraftError

AnswerEvent: TypeAlias = str | AnswerRound | AnswerPiece | Revision | ToolCall | Finish


class AnswerEvents:
    """The events of the answers to one HTTP request, until its client leaves.

    Args:
        worker: answers them.
        request: of HTTP.
        prompt_field: the field of the request that has the prompt.
    """

    def __init__(self, worker: Worker, request: Request, prompt_field: str) -> None:
        self._worker = worker
        self._prompt_field = prompt_field
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._job: Job | None = None
        self._watch = self._loop.create_task(self._cancel_when_the_client_leaves(request))

    def start(self, answer_request: AnswerRequest) -> None:
        """Submit the next answer, after the last one has ended; a full queue refuses the first alone.

        Raises:
            HttpError: the queue is full, or the service is ending.
        """
        self._job = Job(answer_request, self._deliver, is_first=self._job is None)
        try:
            self._worker.submit(self._job)
        except EdgedraftError as error:
            raise HttpError.of(error, self._prompt_field) from error

    async def next(self) -> AnswerEvent:
        """The next event.

        Raises:
            HttpError: the answer failed.
            ClientDisconnect: the client has left.
        """
        event = await self._queue.get()
        if isinstance(event, ClientDisconnect):
            raise event
        if isinstance(event, Exception):
            raise HttpError.of(event, self._prompt_field)
        return event

    async def next_within(self, seconds: float) -> AnswerEvent | None:
        """The next event, or None where none comes within ``seconds``; raises what ``next`` raises."""
        try:
            return await asyncio.wait_for(self.next(), seconds)
        except TimeoutError:
            return None

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        if self._job:
            self._job.cancelled.set()

    async def _cancel_when_the_client_leaves(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.cancel()
        self._queue.put_nowait(ClientDisconnect())

    def _deliver(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
