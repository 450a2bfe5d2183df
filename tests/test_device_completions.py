"""Text completions, choices and log-probabilities over HTTP."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from device.answers import job_queue
from device.answers.job import Job
from tests.fakes import PROMPT, next_logits, target_alone
from tests.number_service import (
    TARGET,
    NumberTokenizer,
    OpenCounter,
    complete,
    http_client,
    new_station,
    streamed,
    text_of,
)

TEXT = "3 1 4 1 5"
EXPECTED = target_alone(TARGET, PROMPT, 6)


def complete_text(client: TestClient, **fields: object) -> Any:
    return client.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 6} | fields)


def logprob(tokens: list[int], token_id: int) -> float:
    logits = next_logits(TARGET, tokens).astype(np.float64)
    return float(logits[token_id] - np.log(np.exp(logits).sum()))


@pytest.mark.parametrize("prompt", [TEXT, [TEXT], PROMPT, [PROMPT]], ids=str)
def test_a_prompt_is_a_text_or_token_ids(prompt: object) -> None:
    with http_client(new_station()) as client:
        answer = complete_text(client, prompt=prompt).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": text_of(EXPECTED), "logprobs": None, "finish_reason": "length"}]
    assert [answer["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")] == [5, 6, 11]


def test_several_prompts_have_a_choice_each_and_n_times_as_many() -> None:
    with http_client(new_station()) as client:
        both = complete_text(client, prompt=[TEXT, "7"]).json()["choices"]
        sampled = complete_text(client, prompt=[TEXT, "7"], n=2, temperature=1.0, seed=5).json()["choices"]
        seeds = [complete_text(client, temperature=1.0, seed=seed).json()["choices"][0]["text"] for seed in (5, 6)]
    assert [choice["text"] for choice in both] == [text_of(EXPECTED), text_of(target_alone(TARGET, [7], 6))]
    assert [choice["index"] for choice in sampled] == [0, 1, 2, 3]
    assert [choice["text"] for choice in sampled[:2]] == seeds
    assert seeds[0] != seeds[1]


def test_each_prompt_counts_once_in_the_usage_however_many_choices_it_has() -> None:
    with http_client(new_station()) as client:
        usage = complete_text(client, prompt=["7", "7"], n=3).json()["usage"]
    assert usage["prompt_tokens"] == 2
    assert usage["prompt_tokens_details"]["cached_tokens"] <= 2


def test_a_chat_has_n_choices_whole_and_streamed() -> None:
    with http_client(new_station()) as client:
        whole = complete(client, n=2, temperature=1.0, seed=5).json()
        chunks = streamed(client, n=2, temperature=1.0, seed=5, stream_options={"include_usage": True})
    texts = ["", ""]
    for chunk in chunks[:-1]:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert [whole["usage"][name] for name in ("prompt_tokens", "completion_tokens")] == [5, 24]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_accepted_gets_all_its_choices(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_queue, "_MAX_WAITING", 1)
    first = threading.Event()
    put = job_queue.JobQueue.put

    def put_behind_others(queue: job_queue.JobQueue, job: Job) -> None:
        if first.is_set():
            queue._jobs.append(Job(replace(job.request, max_new_tokens=1), lambda _: None))
        first.set()
        put(queue, job)

    monkeypatch.setattr(job_queue.JobQueue, "put", put_behind_others)
    with http_client(new_station()) as client:
        if stream:
            indices = {chunk["choices"][0]["index"] for chunk in streamed(client, n=3)}
        else:
            indices = {choice["index"] for choice in complete(client, n=3).json()["choices"]}
    assert indices == {0, 1, 2}


def test_a_streamed_text_is_the_whole_one() -> None:
    with http_client(new_station()) as client:
        lines = complete_text(client, stream=True, logprobs=1).text.split("\n\n")
        whole = complete_text(client, logprobs=1).json()["choices"][0]
    assert lines[-2:] == ["data: [DONE]", ""]
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == "length"
    offsets = [offset for choice in choices if choice["logprobs"] for offset in choice["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]


@pytest.mark.parametrize(
    ("stop", "is_reached"), [(text_of(EXPECTED[1:4]) + "x", False), (text_of(EXPECTED[2:5]).strip(), True)], ids=str
)
def test_a_tokens_offset_is_where_its_text_starts_though_stop_strings_hold_text_back(
    stop: str, is_reached: bool
) -> None:
    with http_client(new_station()) as client:
        choice = complete_text(client, stop=stop, logprobs=0).json()["choices"][0]
        lines = complete_text(client, stop=stop, logprobs=0, stream=True).text.split("\n\n")
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert choice["text"] == text_of(EXPECTED[:2] if is_reached else EXPECTED)
    assert offsets == [len("".join(tokens[:index])) for index in range(len(tokens))]
    streamed_choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
    told = [offset for one in streamed_choices if one["logprobs"] for offset in one["logprobs"]["text_offset"]]
    assert told == offsets


def test_chat_log_probabilities_are_the_targets() -> None:
    with http_client(new_station()) as client:
        choice = complete(client, logprobs=True, top_logprobs=2, max_tokens=6).json()["choices"][0]
        plain = complete(client, max_tokens=6).json()["choices"][0]
        chunks = streamed(client, logprobs=True, top_logprobs=2, max_tokens=6)
    assert choice["message"] == plain["message"]
    assert "logprobs" not in plain
    told = choice["logprobs"]["content"]
    streamed_told = [one for chunk in chunks for one in chunk["choices"][0].get("logprobs", {}).get("content", [])]
    assert streamed_told == told
    for index, token_id in enumerate(EXPECTED):
        expected = logprob([*PROMPT, *EXPECTED[:index]], token_id)
        assert told[index]["token"] == f"{token_id} "
        assert told[index]["bytes"] == list(f"{token_id} ".encode())
        assert told[index]["logprob"] == pytest.approx(expected, abs=1e-5)
        assert len(told[index]["top_logprobs"]) == 2
        assert told[index]["top_logprobs"][0]["logprob"] == pytest.approx(expected, abs=1e-5)


def test_an_echo_has_the_prompts_log_probabilities() -> None:
    with http_client(new_station()) as client:
        choice = complete_text(client, echo=True, logprobs=1, max_tokens=1).json()["choices"][0]
        alone = complete_text(client, prompt=PROMPT, echo=True, logprobs=1, max_tokens=0).json()["choices"][0]
        text = complete_text(client, echo=True).json()["choices"][0]["text"]
    tokens = [*PROMPT, EXPECTED[0]]
    told = choice["logprobs"]
    assert told["tokens"] == [f"{token_id} " for token_id in tokens]
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    expected = [logprob(tokens[:index], tokens[index]) for index in range(1, 6)]
    assert told["token_logprobs"][1:] == pytest.approx(expected, abs=1e-5)
    assert told["text_offset"] == [2 * index for index in range(6)]
    assert choice["text"] == text_of(tokens)
    assert alone["logprobs"]["token_logprobs"][1:] == pytest.approx(expected[:-1], abs=1e-5)
    assert text == text_of([*PROMPT, *EXPECTED])


def test_an_echo_of_a_character_of_several_tokens_has_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode_stream(_: NumberTokenizer, token_ids: Iterator[int]) -> Iterator[str]:
        """Token 3 is the first half of a character and 1 the second."""
        return ("" if token_id == 3 else "é" if token_id == 1 else f"{token_id} " for token_id in token_ids)

    monkeypatch.setattr(NumberTokenizer, "decode_stream", decode_stream)
    with http_client(new_station()) as client:
        choice = complete_text(client, prompt=[4, 3, 1, 5], echo=True, logprobs=1, max_tokens=0).json()["choices"][0]
    assert choice["text"] == "4 é5 "
    assert choice["logprobs"]["text_offset"] == [0, 2, 2, 3]


def test_offsets_of_an_answer_count_the_text_of_a_character_that_the_prompt_does_not_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def decode_stream(_: NumberTokenizer, token_ids: Iterator[int]) -> Iterator[str]:
        """Token 3 is the first half of a character, whose text comes at the end."""
        last = 0
        for last in token_ids:
            yield "" if last == 3 else f"{last} "
        if last == 3:
            yield "�"

    monkeypatch.setattr(NumberTokenizer, "decode_stream", decode_stream)
    with http_client(new_station()) as client:
        choice = complete_text(client, prompt=[4, 3], echo=True, logprobs=0, max_tokens=1).json()["choices"][0]
    assert choice["text"].startswith("4 �")
    assert choice["logprobs"]["text_offset"] == [0, 2, 3]


def test_an_echo_of_a_prompt_beyond_the_context_is_refused_and_ends_nothing_else() -> None:
    opened = OpenCounter()
    with http_client(new_station(), opened) as client:
        refused = complete_text(client, prompt=[3] * 4096, echo=True, logprobs=1, max_tokens=0)
        assert complete_text(client).status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert opened.opens == 1


def test_the_token_itself_is_among_the_likeliest_of_a_text_completion() -> None:
    with http_client(new_station()) as client:
        told = complete_text(client, logprobs=1, temperature=1.3, seed=3, max_tokens=30).json()["choices"][0][
            "logprobs"
        ]
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert top[token] == logprob
    assert any(len(top) == 2 for top in told["top_logprobs"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"suffix": "7"}, ["suffix", "left out"]),
        ({"prompt": ""}, ["prompt", "none of them empty"]),
        ({"prompt": []}, ["prompt", "0 prompts"]),
        ({"prompt": [[3], "4", [True]]}, ["prompt", "lists of token ids"]),
        ({"prompt": [20]}, ["prompt", "token ids from 0 to 19"]),
        ({"logprobs": True}, ["logprobs", "a whole number"]),
        ({"max_tokens": 0}, ["max_tokens", "0 with echo"]),
        ({"best_of": 2}, ["best_of"]),
    ],
)
def test_an_invalid_or_unsupported_field_is_refused_by_name(fields: dict[str, object], words: list[str]) -> None:
    with http_client(new_station()) as client:
        response = complete_text(client, **fields)
        assert response.status_code == 400
        assert all(word in response.json()["error"]["message"] for word in words)
        assert complete_text(client).status_code == 200
