"""The device's HTTP service: OpenAI's chat completions, health and readiness.

Knows JSON, status codes and server-sent events; the answers come from the worker.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Collection
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from common.loopback import is_loopback
from device.chat_request import ChatRequest, Defaults, Fields
from device.job import AnswerRequest, Event, Finish, Job
from device.origin_check import OriginCheck
from device.worker import Worker
from protocol.errors import BundleError, EdgedraftError, FaultError, LinkError, SettingsError

logger = logging.getLogger(__name__)

_MAX_BODY_BYTES = 4 * 1024 * 1024
_GRACE_SECONDS = 2
_STOP_SECONDS = 1.0
_CHUNK = "chat.completion.chunk"
_EXAMPLE = "http://127.0.0.1:8080"
_UVICORN: dict[str, Any] = {
    "loop": "asyncio",
    "http": "h11",
    "ws": "none",
    "lifespan": "off",
    "log_config": None,
    "log_level": "warning",
    "access_log": False,
    "proxy_headers": False,
    "timeout_graceful_shutdown": _GRACE_SECONDS,
}
_LOOPBACK_NAMES = ["localhost", "127.0.0.1", "::1", "[::1]"]


def check_bind(bind: str, insecure: bool) -> None:
    """Refuse a malformed address, and one that other machines can reach unless ``insecure`` is set.

    Raises:
        SettingsError: the address is refused.
    """
    parts = urlsplit(bind)
    try:
        complete = parts.scheme == "http" and parts.hostname and parts.port is not None
    except ValueError:
        complete = False
    if not complete:
        raise SettingsError("bind", bind, _EXAMPLE)
    if not insecure and not is_loopback(bind):
        raise SettingsError(
            "bind", bind, f"{_EXAMPLE}; to serve other machines, add --insecure: requests are not authenticated"
        )


def serve(
    worker: Worker, name: str, defaults: Defaults, bind: str, insecure: bool, origins: Collection[str] = ()
) -> None:
    """Serve until interrupted; port 0 in ``bind`` selects a free one.

    Args:
        worker: answers the requests; it is started and stopped here.
        name: of the model.
        defaults: for fields that a request leaves out.
        bind: ``http://HOST:PORT``.
        insecure: serve an address that other machines can reach.
        origins: of the web pages that may send requests.

    Raises:
        SettingsError: other machines can reach the address, and ``insecure`` is not set.
        LinkError: the address cannot be bound.
    """
    check_bind(bind, insecure)
    listening = _listen(bind)
    host, port = listening.getsockname()[:2]
    hosts = ["*"] if insecure else [*_LOOPBACK_NAMES, host]
    config = uvicorn.Config(application(worker, name, defaults, hosts, origins), **_UVICORN)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn stops at them, then raises them again
    server = _Server(config, worker)
    worker.start(on_failure=lambda: setattr(server, "should_exit", True))
    logger.info("serving %s at http://%s:%d", name, f"[{host}]" if ":" in host else host, port)
    try:
        server.run([listening])
    finally:
        worker.stop(_STOP_SECONDS)
    if worker.failure is not None:
        raise worker.failure
    logger.info("stopped")


def application(
    worker: Worker, name: str, defaults: Defaults, hosts: list[str], origins: Collection[str] = ()
) -> Starlette:
    """The application.

    It refuses requests whose Host is not one of ``hosts``, so that DNS rebinding fails,
    and those of web pages, except its own and those of ``origins``.
    """
    endpoints = _Routes(worker, name, defaults)
    return Starlette(
        routes=[
            Route("/healthz", endpoints.health),
            Route("/readyz", endpoints.readiness),
            Route("/v1/models", endpoints.models),
            Route("/v1/chat/completions", endpoints.complete, methods=["POST"], max_body_size=_MAX_BODY_BYTES),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
            Middleware(OriginCheck, origins=origins),
            Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"]),
        ],
        exception_handlers={
            EdgedraftError: _error_response,
            HTTPException: _error_response,
            ClientDisconnect: _no_response,
        },
    )


class _Server(uvicorn.Server):
    """Ends the answers before it waits for the connections to close."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop serving."""
        self._worker.close()
        await super().shutdown(sockets)


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

    async def models(self, _: Request) -> Response:
        """The one model that is served."""
        model = {"id": self._name, "object": "model", "created": self._created, "owned_by": "edgedraft"}
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(self, request: Request) -> Response:
        """An answer, whole or as server-sent events."""
        try:
            fields = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise SettingsError("the request", str(error), "a JSON object") from error
        chat = ChatRequest.read(fields, self._defaults)
        if fields.get("model") not in (None, self._name):
            raise HTTPException(404, f"model is {fields['model']!r}; allowed: {self._name!r}")
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

    async def next(self) -> str | Finish:
        """The next event.

        Raises:
            EdgedraftError: the answer failed.
            HTTPException: it failed in a way that was not foreseen.
            ClientDisconnect: the client has left.
        """
        event = await self._queue.get()
        if isinstance(event, EdgedraftError | ClientDisconnect):
            raise event
        if isinstance(event, Exception):  # logged by the worker
            raise HTTPException(500, "internal error; the log of the device's service has the details")
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
        while isinstance(event := await self._events.next(), str):
            text += event
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": event.reason}
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": _usage(event)}

    async def stream(self, first: str | Finish) -> AsyncIterator[str]:
        """The answer as server-sent events; ``first`` has been received already."""
        event = first
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            while isinstance(event, str):
                yield self._chunk({"content": event})
                event = await self._events.next()
        except (EdgedraftError, HTTPException) as error:
            yield _event(_error(error))
            return
        finally:
            self._events.cancel()
        yield self._chunk({}, event.reason)
        if self._include_usage:
            yield _event(self._head | {"object": _CHUNK, "choices": [], "usage": _usage(event)})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: Fields, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _event(self._head | {"object": _CHUNK, "choices": [choice]})


def _listen(bind: str) -> socket.socket:
    parts = urlsplit(bind)
    assert parts.hostname is not None
    family = socket.AF_INET6 if ":" in parts.hostname else socket.AF_INET
    try:
        return socket.create_server((parts.hostname, parts.port or 0), family=family)
    except (OSError, TypeError, UnicodeError) as error:  # a name that is not text raises TypeError
        reason = getattr(error, "strerror", None) or error
        raise LinkError(f"cannot bind {bind!r}: {reason}; name a free address like {_EXAMPLE}") from error


async def _error_response(_: Request, error: Exception) -> Response:
    """The error as JSON, with its status code."""
    if isinstance(error, HTTPException):
        return JSONResponse(_error(error), error.status_code)
    status = 400 if isinstance(error, SettingsError | BundleError) else 503
    seconds = error.retry_seconds if isinstance(error, EdgedraftError) else 0
    return JSONResponse(_error(error), status, {"Retry-After": str(seconds)} if seconds else None)


async def _no_response(_: Request, __: Exception) -> Response:
    """The client has left."""
    return Response()


def _error(error: Exception) -> Fields:
    code = error.code if isinstance(error, EdgedraftError) else None
    if isinstance(error, FaultError):
        code = error.fault_code
    message = error.detail if isinstance(error, HTTPException) else str(error)
    return {"error": {"message": message, "type": type(error).__name__, "param": None, "code": code}}


def _usage(finish: Finish) -> Fields:
    counts = {"prompt_tokens": finish.prompt_tokens, "completion_tokens": finish.new_tokens}
    return counts | {"total_tokens": finish.prompt_tokens + finish.new_tokens}


def _event(fields: Fields) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"
