"""The HTTP service over models without weights: a token is the text of its number."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, cast

from starlette.testclient import TestClient

from common.grammar import Grammar
from device.answers.worker import Worker
from device.http.answer_fields import Defaults
from device.http.service import Access, application
from device.session.client import Client
from device.settings import DraftSettings, Timeouts
from device.text.tokenizer import ChatMessage, Tokenizer
from device.text.tool_calls import ToolFormat
from protocol.messages import Message, Mode, Open, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table
from tests.json_tokens import COMPILER
from tests.link_pair import CopyCount, MemoryTransport, Station, deliver_once, join

TARGET = random_table(20, seed=1)
DRAFT = blend(TARGET, random_table(20, seed=2), 0.7)
FIELDS = {"messages": [{"role": "user", "content": "3 1 4 1 5"}], "max_tokens": 12}


class NumberTokenizer:
    """Token 7 is the text ``7`` and a space."""

    tool_format: ToolFormat | None = None

    def encode_chat(
        self, messages: Sequence[ChatMessage], _: Sequence[Mapping[str, Any]] = (), __: bool = False
    ) -> list[int]:
        return [int(word) for message in messages for word in message["content"].split()]

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def encode_guess(self, text: str) -> list[int]:
        return self.encode(text)

    def token_text(self, token_id: int) -> str:
        return f"{token_id} "

    def grammar(self, text: str, _: frozenset[int]) -> Grammar:
        return COMPILER.compile(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(self.decode_stream(iter(token_ids)))

    def decode_stream(self, token_ids: Iterator[int]) -> Iterator[str]:
        return (f"{token_id} " for token_id in token_ids)


def text_of(token_ids: Sequence[int]) -> str:
    return NumberTokenizer().decode(token_ids)


def settings(sampling: Sampling, mode: str = "auto", draft_len: str = "4") -> DraftSettings:
    automatic = Mode.IDS if sampling.greedy else Mode.COUPLED
    return DraftSettings(automatic if mode == "auto" else Mode(mode), sampling, uplink_k=1, draft_len=int(draft_len))


DEFAULTS = Defaults(0, 0, 1, None, max_new_tokens=8, mode="auto", draft_len="4", settings=settings)


def new_worker(
    station: Station,
    up: CopyCount = deliver_once,
    clock: Any = lambda: 0.0,
    transport: MemoryTransport | None = None,
    cache_tokens: int = 4096,
    timeouts: Timeouts | None = None,
) -> Worker:
    model, peers = FakeDraftModel.make(DRAFT), count()

    def connect() -> Client:
        return join(station, model, transport or MemoryTransport(station, bytes([next(peers)]), up), timeouts)[0]

    return Worker(model, cast(Tokenizer, NumberTokenizer()), connect, cache_tokens, clock)


@contextmanager
def http_client(
    station: Station,
    up: CopyCount = deliver_once,
    transport: MemoryTransport | None = None,
    origins: Sequence[str] = (),
    api_key: str | None = None,
    cache_tokens: int = 4096,
    timeouts: Timeouts | None = None,
) -> Iterator[TestClient]:
    worker = new_worker(station, up, transport=transport, cache_tokens=cache_tokens, timeouts=timeouts)
    worker.start()
    try:
        yield TestClient(application(worker, "numbers", DEFAULTS, Access(api_key, ["testserver"], origins)))
    finally:
        worker.stop(5)


def new_station() -> Station:
    return Station(FakeTarget.make(TARGET))


def complete(client: TestClient, **fields: object) -> Any:
    return client.post("/v1/chat/completions", json=FIELDS | fields)


def streamed(client: TestClient, **fields: object) -> list[Any]:
    lines = complete(client, stream=True, **fields).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


class OpenCounter:
    """Delivers every message once, and counts the sessions that are opened."""

    def __init__(self) -> None:
        self.opens = 0

    def __call__(self, message: Message) -> int:
        self.opens += isinstance(message, Open)
        return 1


def next_turn(answer: Any) -> list[Any]:
    """The conversation so far with the answer, and another message of the user."""
    first = answer.json()["choices"][0]["message"]
    return [*FIELDS["messages"], first, {"role": "user", "content": "9 2 6"}]  # type: ignore[misc]


def content_of(answer: Any) -> str:
    content: str = answer.json()["choices"][0]["message"]["content"]
    return content
