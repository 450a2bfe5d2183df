"""The device's HTTP service: OpenAI's completions, the chat page, health, readiness and metrics.

Knows JSON, status codes and server-sent events; the answers come from the worker.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from device.answers.worker import Worker
from device.http.answer_events import AnswerEvents
from device.http.answer_fields import Defaults
from device.http.api_key import ApiKeyCheck
from device.http.chat_page import page_routes
from device.http.chat_request import ChatRequest
from device.http.completion import ChatForm, Completion, Form, TextForm
from device.http.host_check import HostCheck
from device.http.http_errors import HttpError, shown
from device.http.json_body import json_body
from device.http.openapi import openapi
from device.http.origin_check import OriginCheck
from device.http.request_fields import Fields
from device.http.request_id import RequestId
from device.http.text_request import TextRequest
from device.http.token_routes import token_routes
from protocol.errors import EdgedraftError


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
        cors = Middleware(
            CORSMiddleware,
            allow_origins=self.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,  # for pages of the Internet, where a browser asks before it calls loopback
        )
        checks = [
            Middleware(RequestId),
            Middleware(HostCheck, hosts=self.hosts),
            Middleware(OriginCheck, origins=self.origins),
            cors,
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
            Route("/health", endpoints.readiness),
            Route("/openapi.json", endpoints.description),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.model),
            Route("/v1/chat/completions", endpoints.complete_chat, methods=["POST"]),
            Route("/v1/completions", endpoints.complete_text, methods=["POST"]),
            *token_routes(worker.tokenizer, worker.vocab_size),
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

    async def description(self, _: Request) -> Response:
        """The description of the service."""
        return JSONResponse(openapi())

    async def models(self, _: Request) -> Response:
        """The list of the one model that is served."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The one model that is served."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _check_model(self, name: object) -> None:
        if name not in (None, self._name):
            message = f"model is {shown(name)}; allowed: {shown(self._name)}"
            raise HttpError(404, message, "model_not_found", "model")

    def _model(self) -> Fields:
        model = {"id": self._name, "object": "model", "created": self._created, "owned_by": "edgedraft"}
        own = {
            "vocab_size": self._worker.vocab_size,
            "temperature": self._defaults.temperature,
            "mode": self._defaults.mode,
            "draft_len": self._defaults.draft_len,
        }
        return model | {"edgedraft": own}

    async def complete_chat(self, request: Request) -> Response:
        """Answers to a conversation, whole or as server-sent events."""
        fields = await json_body(request)
        chat = ChatRequest.read(fields, self._defaults)
        return await self._complete(request, fields, chat, ChatForm())

    async def complete_text(self, request: Request) -> Response:
        """Continuations of texts, whole or as server-sent events."""
        fields = await json_body(request)
        return await self._complete(request, fields, TextRequest.read(fields, self._defaults), TextForm())

    async def _complete(
        self, request: Request, fields: Fields, asked: ChatRequest | TextRequest, form: Form
    ) -> Response:
        self._check_model(fields.get("model"))
        events = AnswerEvents(self._worker, request, form.prompt_field)
        completion = Completion(
            self._name, events, asked.choices, asked.per_prompt, asked.streaming.include_usage, form
        )
        if not asked.streaming.stream:
            return JSONResponse(await completion.whole())
        first = await completion.begin()
        return StreamingResponse(completion.stream(first), media_type="text/event-stream")


async def _error_response(_: Request, error: Exception) -> Response:
    return HttpError.of(error).response()


async def _no_response(_: Request, __: Exception) -> Response:
    """The client has left."""
    return Response()
