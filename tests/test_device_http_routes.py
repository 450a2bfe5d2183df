"""Models, health, tokens and request ids over HTTP, and streams that are kept alive."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any, cast

import pytest

from device.answers.job import AnswerRequest, Finish
from device.http.answer_events import AnswerEvent, AnswerEvents
from device.http.completion import ChatForm, Completion
from protocol.messages import Sampling
from tests.number_service import complete, http_client, new_station, settings


def test_the_model_is_told_by_its_name_and_others_are_not_found() -> None:
    with http_client(new_station()) as client:
        listed = client.get("/v1/models").json()["data"]
        assert client.get("/v1/models/numbers").json() == listed[0]
        missing = client.get("/v1/models/org/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_health_is_the_readiness() -> None:
    with http_client(new_station()) as client:
        complete(client)
        assert client.get("/health").status_code == client.get("/readyz").status_code == 200


def test_texts_and_tokens_are_turned_into_each_other() -> None:
    with http_client(new_station()) as client:
        assert client.post("/tokenize", json={"content": "3 1 4"}).json() == {"tokens": [3, 1, 4]}
        assert client.post("/tokenize", json={"content": ""}).json() == {"tokens": []}
        assert client.post("/detokenize", json={"tokens": [3, 1]}).json() == {"content": "3 1 "}


@pytest.mark.parametrize(
    ("path", "fields", "word"),
    [
        ("/tokenize", {"content": 3}, "content"),
        ("/tokenize", {"content": "3 \ud800"}, "content is"),
        ("/tokenize", [], "a JSON object"),
        ("/detokenize", {"tokens": [20]}, "0 to 19"),
        ("/detokenize", {"tokens": ["3"]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
    ],
)
def test_invalid_texts_and_tokens_are_refused(path: str, fields: object, word: str) -> None:
    with http_client(new_station()) as client:
        response = client.post(path, content=json.dumps(fields))
    assert response.status_code == 400
    assert word in response.json()["error"]["message"]


def test_every_response_has_the_id_of_its_request() -> None:
    with http_client(new_station(), api_key="key") as client:
        for path in ("/v1/models", "/healthz", "/nothing"):
            assert client.get(path, headers={"X-Request-Id": "job-7"}).headers["x-request-id"] == "job-7"
        new = {client.get("/healthz").headers["x-request-id"] for _ in range(2)}
        forged = client.get("/healthz", headers={"X-Request-Id": "a b" * 99}).headers["x-request-id"]
    assert len(new) == 2
    assert all(one.startswith("req-") for one in (*new, forged))


class SlowEvents:
    """Events with nothing in between for a while."""

    def __init__(self, events: Sequence[AnswerEvent | None]) -> None:
        self._events = [*events]

    def start(self, _: AnswerRequest) -> None:
        pass

    async def next(self) -> Any:
        return self._events.pop(0)

    async def next_within(self, _: float) -> Any:
        return self._events.pop(0)

    def cancel(self) -> None:
        pass


def comments_of(events: SlowEvents, choices: int) -> list[bool]:
    """Whether each chunk of a stream is a comment."""
    request = AnswerRequest("3", settings(Sampling()), 2)
    completion = Completion("numbers", cast(AnswerEvents, events), choices * [request], choices, False, ChatForm())

    async def chunks() -> list[str]:
        return [chunk async for chunk in completion.stream(await completion.begin())]

    return [chunk == ": keep-alive\n\n" for chunk in asyncio.run(chunks())]


def test_a_stream_without_events_is_kept_alive() -> None:
    events = SlowEvents(["3 ", None, None, "1 ", Finish("stop", 5, 2)])
    assert comments_of(events, choices=1) == [False, False, True, True, False, False, False]


def test_a_stream_whose_later_choice_waits_is_kept_alive() -> None:
    finish = Finish("stop", 5, 1)
    events = SlowEvents(["3 ", finish, None, None, "1 ", finish])
    first, later = [False, False, False], [False, True, True, False, False]
    assert comments_of(events, choices=2) == [*first, *later, False]
