"""The service in an outage: unverified text, and what replaces it, for clients that ask; verified text for others."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.testclient import TestClient

from device.settings import Timeouts
from tests.fakes import PROMPT, target_alone
from tests.number_service import DRAFT, TARGET, complete, http_client, new_station, text_of
from tests.outages import OutTransport

COUNT, BEGIN = 40, 6
OUTAGE = Timeouts(outage=0.5, resend=1)
RIGHT = target_alone(TARGET, PROMPT, COUNT)
ASKED = {"unverified": True}


def until_drafted(count: int, begin: int = BEGIN) -> Callable[[OutTransport], bool]:
    """An outage from the device's message ``begin`` on, until it has looked for a reply about ``count`` times."""
    asked = 0

    def is_out(transport: OutTransport) -> bool:
        nonlocal asked
        if transport.sent < begin or asked > count:
            return False
        asked += 1
        return True

    return is_out


@contextmanager
def outage(is_out: Callable[[OutTransport], bool]) -> Iterator[TestClient]:
    station = new_station()
    with http_client(station, transport=OutTransport(station, is_out), timeouts=OUTAGE) as client:
        yield client


def stream(client: TestClient, **fields: Any) -> list[Any]:
    events = complete(client, stream=True, max_tokens=COUNT, **fields).text
    return [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: {")]


def shown(chunks: list[Any]) -> str:
    """The text, as docs/http.md says that a client puts it together."""
    text = ""
    for chunk in chunks:
        replaced = chunk.get("edgedraft", {}).get("replaced", 0)
        text = text[: len(text) - replaced] + chunk["choices"][0]["delta"].get("content", "")
    return text


@pytest.mark.parametrize("begin", [2, BEGIN])
@pytest.mark.parametrize("count", [20, 30])
def test_chunks_and_their_replaced_characters_give_the_verified_answer(begin: int, count: int) -> None:
    with outage(until_drafted(count, begin)) as client:
        chunks = stream(client, edgedraft=ASKED)
    told = [chunk["edgedraft"] for chunk in chunks if "edgedraft" in chunk]
    assert shown(chunks) == text_of(RIGHT)
    assert max(entry["unverified"] for entry in told) > 0
    assert sum(entry["replaced"] for entry in told) > 0
    assert told[-1]["unverified"] == 0
    assert chunks[-1]["timings"]["unverified_n"] == 0


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_does_not_ask_gets_verified_text_alone(streamed: bool) -> None:
    with outage(until_drafted(14)) as client:
        if streamed:
            chunks = stream(client)
            assert not any("edgedraft" in chunk for chunk in chunks)
            assert shown(chunks) == text_of(RIGHT)
        else:
            answer = complete(client, max_tokens=COUNT).json()
            assert answer["choices"][0]["message"]["content"] == text_of(RIGHT)
            assert answer["timings"]["unverified_n"] == 0


@pytest.mark.parametrize("asked", [ASKED, {}])
def test_an_answer_that_ends_in_an_outage_says_how_much_of_it_is_unverified(asked: dict[str, bool]) -> None:
    with outage(lambda transport: transport.sent >= BEGIN) as client:
        chunks = stream(client, edgedraft=asked)
        whole = complete(client, max_tokens=COUNT, edgedraft=asked).json()
    tokens, unverified = [int(word) for word in shown(chunks).split()], chunks[-1]["timings"]["unverified_n"]
    verified = tokens[: COUNT - unverified]
    assert 0 < unverified < COUNT
    assert tokens == [*verified, *target_alone(DRAFT, [*PROMPT, *verified], unverified)]
    assert verified == RIGHT[: len(verified)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert whole["choices"][0]["message"]["content"] == text_of(target_alone(DRAFT, PROMPT, COUNT))
    assert whole["timings"]["unverified_n"] == whole["usage"]["completion_tokens"] == COUNT


@pytest.mark.parametrize("asked", [ASKED, {}])
def test_a_stop_string_in_unverified_text_ends_the_answer(asked: dict[str, bool]) -> None:
    alone = target_alone(DRAFT, PROMPT, COUNT)
    stop = text_of(alone[5:7])
    with outage(lambda _: True) as client:
        chunks = stream(client, edgedraft=asked, stop=stop)
    assert shown(chunks) == text_of(alone).partition(stop)[0]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["timings"]["unverified_n"] < COUNT


def test_the_next_turn_after_an_unverified_answer_is_the_targets_own() -> None:
    is_out = True
    with outage(lambda _: is_out) as client:
        first = complete(client, max_tokens=COUNT).json()["choices"][0]["message"]["content"]
        is_out = False
        prompt = [*PROMPT, *map(int, first.split()), 2]
        message = {"role": "user", "content": text_of(prompt)}
        second = complete(client, messages=[message], max_tokens=COUNT).json()
    assert second["choices"][0]["message"]["content"] == text_of(target_alone(TARGET, prompt, COUNT))
    assert second["timings"]["unverified_n"] == 0


@pytest.mark.parametrize("fields", [{"logprobs": True}, {"edgedraft": {"unverified": True, "rounds": True}}])
def test_unverified_text_is_refused_with_what_excludes_it(fields: dict[str, Any]) -> None:
    with outage(lambda _: False) as client:
        fields = {"edgedraft": ASKED} | fields
        error = complete(client, **fields)
    assert error.status_code == 400
    assert "edgedraft.unverified" in error.json()["error"]["message"]


def test_log_probabilities_wait_for_the_base_station() -> None:
    with outage(until_drafted(14)) as client:
        answer = complete(client, max_tokens=COUNT, logprobs=True).json()
    assert answer["choices"][0]["message"]["content"] == text_of(RIGHT)
    assert len(answer["choices"][0]["logprobs"]["content"]) == COUNT


@pytest.mark.parametrize("begin", [0, BEGIN])
def test_text_that_ends_a_stream_of_rounds_unverified_says_so(begin: int) -> None:
    with outage(lambda transport: transport.sent >= begin) as client:
        chunks = stream(client, edgedraft={"rounds": True})
    texts = dict.fromkeys(["tokens", "unverified"], "")
    for chunk in chunks:
        content = chunk["choices"][0]["delta"].get("content", "")
        for name in texts:
            texts[name] += content if name in chunk.get("edgedraft", {}) else ""
    assert texts["tokens"] + texts["unverified"] == shown(chunks)
    assert len(texts["unverified"].split()) == chunks[-1]["timings"]["unverified_n"] > 0
    assert bool(texts["tokens"]) is (begin == BEGIN)


@pytest.mark.parametrize("asked", [ASKED, {"rounds": True}])
def test_unverified_text_that_was_held_back_for_a_stop_string_is_told_as_unverified(asked: dict[str, bool]) -> None:
    alone = text_of(target_alone(DRAFT, PROMPT, COUNT))
    with outage(lambda _: True) as client:
        chunks = stream(client, edgedraft=asked, stop=f"{alone}and more")
    assert shown(chunks) == alone
    assert [chunk["edgedraft"]["unverified"] for chunk in chunks if "edgedraft" in chunk][-1] == len(alone)
