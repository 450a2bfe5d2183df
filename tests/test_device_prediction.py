"""OpenAI's field ``prediction``: what it proposes is a guess, and what became of it is counted."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from device.answers.worker import Worker
from device.drafting.no_draft_model import NoDraftModel
from device.http.service import Access, application
from device.text.tokenizer import Tokenizer
from protocol.messages import Sampling
from tests.fakes import PROMPT, manifest, target_alone
from tests.link_pair import Station, join
from tests.number_service import (
    DEFAULTS,
    TARGET,
    NumberTokenizer,
    complete,
    content_of,
    new_station,
    settings,
    streamed,
    text_of,
)

ANSWER = target_alone(TARGET, PROMPT, 12)


def looking_up(sampling: Sampling, mode: str = "auto", draft_len: str = "4") -> Any:
    return replace(settings(sampling, mode, draft_len), lookup=True)


@contextmanager
def lookup_client(station: Station) -> Iterator[TestClient]:
    """A service without a draft model."""
    model = NoDraftModel(manifest(len(TARGET)))
    worker = Worker(model, cast(Tokenizer, NumberTokenizer()), lambda: join(station, model)[0], 4096, lambda: 0.0)
    worker.start()
    try:
        defaults = replace(DEFAULTS, settings=looking_up)
        yield TestClient(application(worker, "numbers", defaults, Access(None, ["testserver"])))
    finally:
        worker.stop(5)


def predicted(text: str) -> dict[str, Any]:
    return {"type": "content", "content": text}


@pytest.mark.parametrize(
    ("prediction", "least", "rejected"),
    [(ANSWER, 8, 0), ([*ANSWER[:3], 19, 19, *ANSWER[5:]], 4, 1), ([19] * 5000, 0, 1)],
    ids=["right", "edited", "wrong"],
)
def test_the_answer_is_the_same_and_what_was_right_is_counted(prediction: list[int], least: int, rejected: int) -> None:
    with lookup_client(new_station()) as client:
        answer = complete(client, prediction=predicted(text_of(prediction)))
        chunks = streamed(client, prediction=predicted(text_of(prediction)), stream_options={"include_usage": True})
    assert content_of(answer) == text_of(ANSWER)
    details = answer.json()["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] >= least
    assert min(details["rejected_prediction_tokens"], 1) == rejected
    assert chunks[-1]["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] >= least


def test_parts_of_text_are_one_prediction_and_the_choices_count_together() -> None:
    parts = [{"type": "text", "text": text_of(part)} for part in (ANSWER[:6], ANSWER[6:])]
    with lookup_client(new_station()) as client:
        one, two = (complete(client, n=n, prediction={"type": "content", "content": parts}).json() for n in (1, 2))
    counts = [answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] for answer in (one, two)]
    assert counts[1] == 2 * counts[0] > 10


def test_without_a_prediction_none_is_counted() -> None:
    with lookup_client(new_station()) as client:
        assert "completion_tokens_details" not in complete(client).json()["usage"]
        assert "completion_tokens_details" not in complete(client, prediction=None).json()["usage"]


@pytest.mark.parametrize(
    ("prediction", "name"),
    [
        ("text", "prediction"),
        ({"type": "file", "content": "1"}, "prediction.type"),
        ({"type": "content", "content": 5}, "prediction.content"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "content", "content": [{"type": "image"}]}, "prediction.content"),
        ({"type": "content", "content": "\ud800"}, "prediction.content"),
    ],
)
def test_a_prediction_of_another_kind_is_refused_by_name(prediction: Any, name: str) -> None:
    with lookup_client(new_station()) as client:
        refused = client.post(
            "/v1/chat/completions",
            content=json.dumps({"messages": [{"role": "user", "content": "1"}], "prediction": prediction}),
        )
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == name
