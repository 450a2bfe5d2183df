"""The device's HTTP service: OpenAI's chat completions, the chat page, health, readiness and metrics.

Knows JSON, status codes and server-sent events; the answers come from the worker.
"""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from device.api_key import ApiKeyCheck
from device.chat_page import page_routes
from device.chat_request import ChatRequest, Defaults
from device.host_check import HostCheck
from device.http_errors import HttpError, shown
from device.job import AnswerRequest, Event, Finish, Job
from device.origin_check import OriginCheck
from device.request_fields import Fields
from device.round_events import AnswerRound
from device.worker import Worker
from protocol.errors import EdgedraftError

_MAX_BODY_BYTES = 4 * 1024 * 1024
_CHUNK = "chat.completion.chunk"


@dataclass(frozen=True)
class Access:
    """Who may use the service.

    Attributes:
        api_key: that requests must send, if there is one.
        hosts: names by which the service may be called; None allows every name.
        origins: of the web pages that may send requests, besides its own.
    """

    api_key: str | None = None
    hosts: Collection[str] | None = None
    origins: Collection[str] = ()

    def checks(self) -> list[Middleware]:
        """The middleware that refuses all others; a page may ask for its access without the key."""
        checks = [
            Middleware(HostCheck, hosts=self.hosts),
            Middleware(OriginCheck, origins=self.origins),
            Middleware(CORSMiddleware, allow_origins=self.origins, allow_methods=["GET", "POST"], allow_headers=["*"]),
        ]
        return checks if self.api_key is None else [*checks, Middleware(ApiKeyCheck, api_key=self.api_key)]


def application(worker: Worker, name: str, defaults: Defaults, access: Access) -> Starlette:
    """The application."""
    endpoints = _Routes(worker, name, defaults)
    return Starlette(
        routes=[
            Route("/healthz", endpoints.health),
            Route("/readyz", endpoints.readiness),
            Route("/metrics", endpoints.metrics),
            Route("/v1/models", endpoints.models),
            Route("/v1/chat/completions", endpoints.complete, methods=["POST"]),
            *page_routes(),
        ],
        middleware=access.checks(),
        exception_handlers={
            HttpError: _error_response,
            EdgedraftError: _error_response,
            HTTPException: _error_response,
            Exception: _error_response,
            ClientDisconnect: _no_response,
        },
    )


class _Routes:
    """The endpoints."""

    def __init__(self, worker: Worker, name: str, defaults: Defaults) -> None:
        self._worker = worker
        self._name = name
        self._defaults = defaults
        self._created = int(time.time())

    async def health(self, _: Request) -> Response:
        """Liveness: the process can answer."""
        if self._worker.failure is None:
            return PlainTextResponse("ok\n")
        return PlainTextResponse("the worker failed\n", 503)

    async def readiness(self, _: Request) -> Response:
        """Readiness: the model is loaded and the base station answered recently."""
        if self._worker.ready:
            return PlainTextResponse("ready\n")
        return PlainTextResponse("the base station does not answer\n", 503)

    async def metrics(self, _: Request) -> Response:
        """The metrics in Prometheus' format."""
        return Response(generate_latest(self._worker.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, _: Request) -> Response:
        """The one model that is served."""
        model = {"id": self._name, "object": "model", "created": self._created, "owned_by": "edgedraft"}
        own = {
            "vocab_size": self._worker.vocab_size,
            "temperature": self._defaults.temperature,
            "mode": self._defaults.mode,
            "draft_len": self._defaults.draft_len,
        }
        return JSONResponse({"object": "list", "data": [model | {"edgedraft": own}]})

    async def complete(self, request: Request) -> Response:
        """An answer, whole or as server-sent events."""
        try:
            fields = json.loads(await _body(request))
        except (ValueError, RecursionError) as error:
            raise HttpError(400, f"the body is not JSON: {error}") from error
        chat = ChatRequest.read(fields, self._defaults)
        if fields.get("model") not in (None, self._name):
            message = f"model is {shown(fields['model'])}; allowed: {shown(self._name)}"
            raise HttpError(404, message, "model_not_found", "model")
        events = _AnswerEvents(self._worker, chat.request, request)
        completion = _Completion(self._name, events, chat.include_usage)
        if not chat.stream:
            return JSONResponse(await completion.whole())
        first = await events.next()  # an error before it still has a status code
        return StreamingResponse(completion.stream(first), media_type="text/event-stream")


class _AnswerEvents:
    """An answer's events, handed from the worker's thread to the event loop."""

    def __init__(self, worker: Worker, answer_request: AnswerRequest, request: Request) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._job = Job(answer_request, self._deliver)
        worker.submit(self._job)
        self._watch = self._loop.create_task(self._cancel_when_the_client_leaves(request))

    async def next(self) -> str | AnswerRound | Finish:
        """The next event.

        Raises:
            HttpError: the answer failed.
            ClientDisconnect: the client has left.
        """
        event = await self._queue.get()
        if isinstance(event, ClientDisconnect):
            raise event
        if isinstance(event, Exception):
            raise HttpError.of(event)
        return event

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self._job.cancelled.set()

    async def _cancel_when_the_client_leaves(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.cancel()
        self._queue.put_nowait(ClientDisconnect())

    def _deliver(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)


class _Completion:
    """An answer as JSON objects, whole or in chunks."""

    def __init__(self, name: str, events: _AnswerEvents, include_usage: bool) -> None:
        self._events = events
        self._include_usage = include_usage
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}

    async def whole(self) -> Fields:
        """The answer as one object."""
        text = ""
        while not isinstance(event := await self._events.next(), Finish):
            assert isinstance(event, str)  # rounds are streamed only
            text += event
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": event.reason}
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": _usage(event)}

    async def stream(self, first: str | AnswerRound | Finish) -> AsyncIterator[str]:
        """The answer as server-sent events; ``first`` has been received already."""
        event = first
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            while not isinstance(event, Finish):
                yield self._content(event)
                event = await self._events.next()
        except HttpError as error:
            yield _event(error.fields)
            return
        except ClientDisconnect:
            return
        finally:
            self._events.cancel()
        yield self._chunk({}, event.reason)
        if self._include_usage:
            yield _event(self._head | {"object": _CHUNK, "choices": [], "usage": _usage(event)})
        yield "data: [DONE]\n\n"

    def _content(self, event: str | AnswerRound) -> str:
        if isinstance(event, str):
            return self._chunk({"content": event})
        return self._chunk({"content": event.text}, edgedraft=event.fields)

    def _chunk(self, delta: Fields, finish_reason: str | None = None, **extension: Fields) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _event(self._head | {"object": _CHUNK, "choices": [choice]} | extension)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BODY_BYTES:
            raise HttpError(413, f"the body is longer than {_MAX_BODY_BYTES} bytes")
    return bytes(body)


async def _error_response(_: Request, error: Exception) -> Response:
    return HttpError.of(error).response()


async def _no_response(_: Request, __: Exception) -> Response:
    """The client has left."""
    return Response()


def _usage(finish: Finish) -> Fields:
    counts = {"prompt_tokens": finish.prompt_tokens, "completion_tokens": finish.new_tokens}
    return counts | {"total_tokens": finish.prompt_tokens + finish.new_tokens}


def _event(fields: Fields) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"
