"""A stream that asks for rounds reports each one with its record and its tokens' origins; others are as before."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from device.http.chat_request import ChatRequest
from device.options import AnswerOptions
from device.session.round_records import RoundRecord
from device.settings import DraftSettings
from protocol.errors import SettingsError
from protocol.messages import Mode, Sampling
from tests.fakes import PROMPT, FakeTarget, target_alone
from tests.link_pair import Station
from tests.number_service import (
    DEFAULTS,
    FIELDS,
    TARGET,
    NumberTokenizer,
    complete,
    http_client,
    new_station,
    streamed,
    text_of,
)


def rounds_of(chunks: list[Any]) -> list[dict[str, Any]]:
    return [chunk["edgedraft"] for chunk in chunks if "edgedraft" in chunk]


def stream_rounds(extension: dict[str, Any] | None = None, **fields: object) -> list[Any]:
    with http_client(new_station()) as client:
        return streamed(client, **fields, edgedraft={"rounds": True, **(extension or {})})


def content_of(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_rounds_hold_the_answer_token_by_token() -> None:
    chunks = stream_rounds()
    rounds, expected = rounds_of(chunks), target_alone(TARGET, PROMPT, 12)
    tokens = [token for one in rounds for token in one["tokens"]]
    assert [token["token_id"] for token in tokens] == expected
    assert [token["text"] for token in tokens] == [text_of([token_id]) for token_id in expected]
    assert content_of(chunks) == text_of(expected)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_a_round_has_the_fields_of_its_record_and_the_origins_that_follow_from_it() -> None:
    rounds = rounds_of(stream_rounds())
    assert all(set(one) == {*RoundRecord.__dataclass_fields__, "tokens"} for one in rounds)
    assert all(later["round"] == earlier["round"] + 1 for earlier, later in pairwise(rounds))
    for one in rounds:
        assert one["uplink_bytes"] > 0
        *accepted, last = [token["origin"] for token in one["tokens"]]
        assert accepted == ["accepted"] * one["accepted"]
        full = "bonus" if one["drafted"] else "target"
        assert last == (full if one["accepted"] == one["drafted"] else "recovered")
        assert one["tokens"][-1]["token_id"] == one["token_id"]
    assert {token["origin"] for one in rounds for token in one["tokens"]} >= {"accepted", "recovered"}


def test_accepted_tokens_have_a_margin_where_an_argmax_is_taken() -> None:
    for extension, sampled in (({}, False), ({"mode": "coupled"}, False), ({"mode": "topk"}, True)):
        rounds = rounds_of(stream_rounds(extension, temperature=1.0, seed=5))
        margins = [token["margin"] for one in rounds for token in one["tokens"] if token["origin"] == "accepted"]
        assert margins
        assert all(margin is None if sampled else margin > 0 for margin in margins)
        others = [token["margin"] for one in rounds for token in one["tokens"] if token["origin"] != "accepted"]
        assert set(others) == {None}


def test_speculation_off_lets_the_target_decode_alone() -> None:
    rounds = rounds_of(stream_rounds({"mode": "target"}))
    assert {one["mode"] for one in rounds} == {"target"}
    assert {token["origin"] for one in rounds for token in one["tokens"]} == {"target"}


def test_a_request_sets_the_draft_length() -> None:
    for draft_len in (1, 3):
        rounds = rounds_of(stream_rounds({"draft_len": draft_len}))
        assert max(one["drafted"] for one in rounds) == draft_len


def test_an_answer_that_ends_within_a_round_reports_what_it_has() -> None:
    tokens = target_alone(TARGET, PROMPT, 12)
    station = Station(FakeTarget.make(TARGET, stop_ids=frozenset({tokens[5]})))
    with http_client(station) as client:
        chunks = streamed(client, edgedraft={"rounds": True})
    ids = [token["token_id"] for one in rounds_of(chunks) for token in one["tokens"]]
    assert ids == tokens[: tokens.index(tokens[5]) + 1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stop_string_ends_the_rounds_too() -> None:
    tokens = target_alone(TARGET, PROMPT, 12)
    stop = f"{tokens[4]} {tokens[5]}"
    chunks = stream_rounds(stop=stop)
    assert content_of(chunks) == text_of(tokens).partition(stop)[0]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_text_that_was_missing_at_the_end_follows_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(_: object, token_ids: Iterator[int]) -> Iterator[str]:
        held = ""
        for token_id in token_ids:
            yield held
            held = f"{token_id} "
        yield held

    monkeypatch.setattr(NumberTokenizer, "decode_stream", late)
    chunks = stream_rounds()
    assert content_of(chunks) == text_of(target_alone(TARGET, PROMPT, 12))
    assert [len(one["tokens"]) for one in rounds_of(chunks)]
    assert sum(len(one["tokens"]) for one in rounds_of(chunks)) == 12
    assert "edgedraft" not in chunks[-2]


def test_a_request_without_rounds_collects_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device.answers.worker.RoundEvents", None)
    with http_client(new_station()) as client:
        chunks = streamed(client)
        after = streamed(client, edgedraft={"rounds": False})
    for one in (chunks, after):
        assert rounds_of(one) == []
        assert len(one) == 14


def test_rounds_of_one_request_are_not_reported_to_the_next() -> None:
    with http_client(new_station()) as client:
        assert rounds_of(streamed(client, edgedraft={"rounds": True}))
        assert rounds_of(streamed(client)) == []
        assert "edgedraft" not in complete(client).json()


def test_a_whole_answer_has_the_same_rounds() -> None:
    expected = rounds_of(stream_rounds())
    with http_client(new_station()) as client:
        choice = complete(client, edgedraft={"rounds": True}).json()["choices"][0]
        refused = complete(client, edgedraft={"rounds": True}, logprobs=True)
    rounds = choice["edgedraft"]["rounds"]
    assert [one["tokens"] for one in rounds] == [one["tokens"] for one in expected]
    assert {token["origin"] for one in rounds for token in one["tokens"]} <= {"accepted", "recovered", "bonus"}
    assert refused.status_code == 400
    assert "edgedraft.rounds is true; allowed: false, or true without logprobs" in refused.text


@pytest.mark.parametrize(
    ("extension", "words"),
    [
        ("on", ["edgedraft is", "on", "an object"]),
        ({"round": True}, ["edgedraft.round is", "mode, draft_len, rounds"]),
        ({"mode": 3}, ["edgedraft.mode is", "3", "coupled"]),
        ({"draft_len": 2.5}, ["edgedraft.draft_len is", "2.5", "auto"]),
        ({"draft_len": True}, ["edgedraft.draft_len is", "True"]),
        ({"rounds": 1}, ["edgedraft.rounds is", "1", "true or false"]),
    ],
    ids=str,
)
def test_an_invalid_extension_is_refused_by_name(extension: object, words: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        ChatRequest.read(FIELDS | {"edgedraft": extension}, DEFAULTS)
    assert all(word in str(error.value) for word in words)


def test_what_the_base_station_does_not_serve_names_the_field() -> None:
    with http_client(new_station()) as client:
        response = complete(client, edgedraft={"draft_len": 500})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "edgedraft.draft_len"


@pytest.mark.parametrize(
    ("temperature", "mode", "draft_len", "found"),
    [
        (0.0, "target", "3", (Mode.TARGET, 3)),
        (0.0, "ids", "auto", (Mode.IDS, None)),
        (1.0, "coupled", "auto", (Mode.COUPLED, None)),
        (1.0, "ids", "auto", "mode"),
        (0.0, "fast", "auto", "mode"),
        (0.0, "ids", "0", "draft-len"),
        (0.0, "ids", "-1", "draft-len"),
    ],
)
def test_mode_and_draft_length_of_a_request_override_the_options(
    temperature: float, mode: str, draft_len: str, found: object
) -> None:
    options = AnswerOptions(bundle=Path("none"), server="tcp://10.0.0.5:5755", mode="full", draft_len="7")
    sampling = Sampling(temperature, seed=1)
    assert options.draft_settings(sampling) == DraftSettings(Mode.FULL, sampling, 1, 7, drafts_ahead=None, lookup=True)
    if isinstance(found, str):
        with pytest.raises(SettingsError) as error:
            options.draft_settings(sampling, mode, draft_len)
        assert error.value.name == found
    else:
        settings = options.draft_settings(sampling, mode, draft_len)
        assert (settings.mode, settings.draft_len) == found


def test_the_model_lists_its_vocabulary_and_the_defaults() -> None:
    with http_client(new_station()) as client:
        own = client.get("/v1/models").json()["data"][0]["edgedraft"]
    assert own == {"vocab_size": 20, "temperature": 0, "mode": "auto", "draft_len": "4"}
