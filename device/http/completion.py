"""Answers as OpenAI's JSON objects, whole or in chunks, of the chat or of the text completions API."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from starlette.requests import ClientDisconnect

from device.answers.job import AnswerPiece, AnswerRequest, Finish
from device.answers.round_events import AnswerRound
from device.answers.timings import Timings
from device.http.answer_events import AnswerEvent, AnswerEvents
from device.http.http_errors import HttpError
from device.http.request_fields import Fields
from device.text.tentative_text import Revision
from device.text.tool_calls import ToolCall

_LEAST_LOGPROB = -9999.0
"""What OpenAI sends for a probability of 0; JSON has no infinity."""
_KEEP_ALIVE_SECONDS = 15.0
"""A stream without an event for so long gets a comment, so that proxies keep it open."""


class Form(Protocol):
    """How an API writes answers."""

    id_prefix: str
    kind: str
    chunk_kind: str
    prompt_field: str

    def choice(self, text: str, pieces: Sequence[AnswerPiece], calls: Sequence[ToolCall]) -> Fields:
        """What a whole answer adds to its choice."""

    def first(self) -> Fields | None:
        """What the first chunk of a choice adds to it; None where there is no such chunk."""

    def part(self, text: str, pieces: Sequence[AnswerPiece]) -> Fields:
        """What a part of an answer adds to the choice of its chunk."""

    def call(self, index: int, call: ToolCall) -> Fields:
        """What the call with this number adds to the choice of its chunk."""


class ChatForm:
    """Chat completions."""

    id_prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    prompt_field = "messages"

    def choice(self, text: str, pieces: Sequence[AnswerPiece], calls: Sequence[ToolCall]) -> Fields:
        """The message."""
        message: Fields = {"role": "assistant", "content": text}
        if calls:
            message = message | {"content": text or None, "tool_calls": list(map(_call, calls))}
        return {"message": message, **self._logprobs(pieces)}

    def first(self) -> Fields:
        """The role."""
        return {"delta": {"role": "assistant", "content": ""}}

    def part(self, text: str, pieces: Sequence[AnswerPiece]) -> Fields:
        """The new text."""
        return {"delta": {"content": text} if text or pieces else {}, **self._logprobs(pieces)}

    def call(self, index: int, call: ToolCall) -> Fields:
        """The whole call."""
        return {"delta": {"tool_calls": [{"index": index, **_call(call)}]}}

    def _logprobs(self, pieces: Sequence[AnswerPiece]) -> Fields:
        return {"logprobs": {"content": [self._token(piece) for piece in pieces]}} if pieces else {}

    def _token(self, piece: AnswerPiece) -> Fields:
        top = [_token_logprob(text, logprob) for text, logprob in piece.top]
        return {**_token_logprob(piece.token, piece.logprob), "top_logprobs": top}


class TextForm:
    """Text completions."""

    id_prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"
    prompt_field = "prompt"

    def choice(self, text: str, pieces: Sequence[AnswerPiece], _: Sequence[ToolCall]) -> Fields:
        """The text."""
        return self.part(text, pieces)

    def first(self) -> None:
        """No chunk comes before the text."""

    def part(self, text: str, pieces: Sequence[AnswerPiece]) -> Fields:
        """The new text."""
        return {"text": text, "logprobs": self._logprobs(pieces) if pieces else None}

    def call(self, _: int, call: ToolCall) -> Fields:
        """Text completions call no tools."""
        raise AssertionError(call)

    def _logprobs(self, pieces: Sequence[AnswerPiece]) -> Fields:
        return {
            "tokens": [piece.token for piece in pieces],
            "token_logprobs": [_finite(piece.logprob) for piece in pieces],
            "top_logprobs": [None if piece.logprob is None else _top(piece) for piece in pieces],
            "text_offset": [piece.offset for piece in pieces],
        }


class Completion:
    """The answers to one request, one after the other.

    Args:
        name: of the model.
        events: of the answers.
        choices: to answer.
        per_prompt: how many of them each prompt has, one after the other.
        include_usage: whether a stream ends with the token counts.
        form: of the API.
    """

    def __init__(
        self,
        name: str,
        events: AnswerEvents,
        choices: Sequence[AnswerRequest],
        per_prompt: int,
        include_usage: bool,
        form: Form,
    ) -> None:
        self._events = events
        self._choices = choices
        self._per_prompt = per_prompt
        self._include_usage = include_usage
        self._form = form
        self._finishes: list[Finish] = []
        self._head = {"id": form.id_prefix + secrets.token_hex(12), "created": int(time.time()), "model": name}

    async def whole(self) -> Fields:
        """All answers as one object."""
        choices = []
        try:
            for index, request in enumerate(self._choices):
                self._events.start(request)
                choices.append({"index": index, **await self._whole_choice()})
        finally:
            self._events.cancel()
        timings = sum((finish.timings for finish in self._finishes), Timings())
        end = {"choices": choices, "usage": self._usage(), "timings": timings.fields}
        return self._head | {"object": self._form.kind} | end

    async def _whole_choice(self) -> Fields:
        text, pieces, calls, rounds = "", list[AnswerPiece](), list[ToolCall](), list[Fields]()
        while not isinstance(event := await self._events.next(), Finish):
            if isinstance(event, ToolCall):
                calls.append(event)
                continue
            if isinstance(event, Revision):
                text = text[: len(text) - len(event.replaced)]
            text += event if isinstance(event, str) else event.text
            pieces += [event] if isinstance(event, AnswerPiece) else []
            rounds += [event.fields] if isinstance(event, AnswerRound) else []
        self._finishes.append(event)
        choice = {**self._form.choice(text, pieces, calls), "finish_reason": event.reason}
        return choice | ({"edgedraft": {"rounds": rounds}} if rounds else {})

    async def begin(self) -> AnswerEvent:
        """The first event of the first answer: an error before it still has a status code."""
        self._events.start(self._choices[0])
        return await self._events.next()

    async def stream(self, first: AnswerEvent) -> AsyncIterator[str]:
        """All answers as server-sent events; ``first`` is what ``begin`` returned."""
        event: AnswerEvent | None = first
        try:
            for index, request in enumerate(self._choices):
                if index:
                    self._events.start(request)
                    event = await self._events.next_within(_KEEP_ALIVE_SECONDS)
                async for chunk in self._stream_choice(index, event):
                    yield chunk
        except HttpError as error:
            yield _event(error.fields)
            return
        except ClientDisconnect:
            return
        finally:
            self._events.cancel()
        if self._include_usage:
            yield _event(self._head | {"object": self._form.chunk_kind, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    async def _stream_choice(self, index: int, event: AnswerEvent | None) -> AsyncIterator[str]:
        """The chunks of one answer from this event on; None stands for a time without one."""
        if (opening := self._form.first()) is not None:
            yield self._chunk(index, opening)
        calls = 0
        while not isinstance(event, Finish):
            if event is None:
                yield ": keep-alive\n\n"
            elif isinstance(event, ToolCall):
                yield self._chunk(index, self._form.call(calls, event))
                calls += 1
            elif isinstance(event, str):
                yield self._chunk(index, self._form.part(event, ()))
            elif isinstance(event, AnswerPiece):
                yield self._chunk(index, self._form.part(event.text, (event,)))
            elif isinstance(event, Revision):
                counts = {"replaced": len(event.replaced), "unverified": event.unverified}
                yield self._chunk(index, self._form.part(event.text, ()), edgedraft=counts)
            else:
                yield self._chunk(index, self._form.part(event.text, ()), edgedraft=event.fields)
            event = await self._events.next_within(_KEEP_ALIVE_SECONDS)
        self._finishes.append(event)
        yield self._chunk(index, self._form.part("", ()), event.reason, timings=event.timings.fields)

    def _chunk(self, index: int, part: Fields, finish_reason: str | None = None, **extension: Fields) -> str:
        choice = {"index": index, **part, "finish_reason": finish_reason}
        return _event(self._head | {"object": self._form.chunk_kind, "choices": [choice]} | extension)

    def _usage(self) -> Fields:
        firsts = self._finishes[:: self._per_prompt]  # a prompt with several choices counts once
        prompt_tokens = sum(finish.prompt_tokens for finish in firsts)
        new_tokens = sum(finish.new_tokens for finish in self._finishes)
        counts: Fields = {"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens}
        counts["prompt_tokens_details"] = {"cached_tokens": sum(finish.timings.cache_n for finish in firsts)}
        predicted = [finish.prediction_tokens for finish in self._finishes if finish.prediction_tokens is not None]
        if predicted:
            accepted, rejected = map(sum, zip(*predicted, strict=True))
            details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}
            counts["completion_tokens_details"] = details
        return counts | {"total_tokens": prompt_tokens + new_tokens}


def _top(piece: AnswerPiece) -> Fields:
    """The likeliest tokens of a text completion, and the token itself where it is none of them."""
    likeliest = {text: _finite(logprob) for text, logprob in reversed(piece.top)}
    return {piece.token: _finite(piece.logprob)} | likeliest


def _call(call: ToolCall) -> Fields:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _token_logprob(text: str, logprob: float | None) -> Fields:
    """A token of a chat completion; no bytes for a part of a character."""
    return {"token": text, "logprob": _finite(logprob), "bytes": None if "�" in text else list(text.encode())}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST_LOGPROB)


def _event(fields: Fields) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"
