"""The fields of a chat request: what they do, and which values are refused by name."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from device.http.chat_request import ChatRequest
from device.text.tokenizer import ChatMessage
from protocol.errors import SettingsError
from protocol.messages import Sampling
from tests import json_tokens
from tests.fakes import PROMPT, FakeTarget, target_alone
from tests.link_pair import Station
from tests.number_service import (
    DEFAULTS,
    FIELDS,
    TARGET,
    NumberTokenizer,
    complete,
    content_of,
    http_client,
    new_station,
    text_of,
)
from tests.slow_sampling import slow_answer


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, ["messages", "one message"]),
        ({"messages": "3 1 4"}, ["messages", "3 1 4", "a list"]),
        ({"messages": [{"role": "critic", "content": "3"}]}, ["critic", "system, user, assistant"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["image_url", "type text"]),
        ({"temperature": "hot"}, ["temperature", "hot", "a number"]),
        ({"temperature": True}, ["temperature", "True", "a number"]),
        ({"temperature": -1}, ["temperature", "-1"]),
        ({"temperature": 10**400}, ["temperature", "a number"]),
        ({"messages": [{"role": "user", "content": "3 \ud800"}]}, ["content", "text"]),
        ({"top_p": 0}, ["top_p", "0", "above 0"]),
        ({"seed": -2}, ["seed", "-2"]),
        ({"top_k": -2}, ["top", "-2"]),
        ({"top_k": 1.5}, ["top_k", "1.5", "a whole number"]),
        ({"max_tokens": 0}, ["max_tokens", "0", "1 or more"]),
        ({"max_completion_tokens": 1.5}, ["max_completion_tokens", "1.5"]),
        ({"stop": ["a"] * 5}, ["stop", "up to 4"]),
        ({"stop": ""}, ["stop", "none of them empty"]),
        ({"n": 9}, ["n is 9", "1 to 8"]),
        ({"logprobs": 2}, ["logprobs", "true or false"]),
        ({"top_logprobs": 3}, ["top_logprobs", "3", "together with logprobs"]),
        ({"logprobs": True, "top_logprobs": 21}, ["top_logprobs", "21", "up to 20"]),
        ({"tools": [{"type": "function"}]}, ["tools", "function"]),
        ({"tool_choice": "required"}, ["tool_choice", "required", "names one of the tools"]),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, ["tool_calls[0]", "function"]),
        ({"response_format": {"type": "yaml"}}, ["response_format", "yaml", "json_object"]),
        ({"response_format": {"type": "json_schema"}}, ["response_format", "json_schema.schema"]),
        ({"response_format": {"type": "json_object", "schema": "S"}}, ["response_format", "S", "an object schema"]),
        ({"response_format": {"type": "json_object", "json_schema": {"a": 1}}}, ["json_schema", "left out"]),
        ({"response_format": {"type": "text", "schema": {"type": "array"}}}, ["response_format.schema", "left out"]),
        ({"response_format": {"type": "json_schema", "json_schema": {"a": 1}}}, ["json_schema.a", "left out"]),
        ({"prediction": {"content": "3", "weight": 2}}, ["prediction.weight", "left out"]),
        ({"grammar": "a", "regex": "b"}, ["grammar", "one of response_format, grammar and regex"]),
        ({"regex": 3}, ["regex", "3", "a regular expression"]),
        ({"regex": "a", "min_tokens": 2}, ["min_tokens", "2", "0 with a grammar"]),
        ({"stream": "yes"}, ["stream", "yes", "true or false"]),
        ({"presence_penalty": 3}, ["presence_penalty", "3", "-2 to 2"]),
        ({"logit_bias": {"a": 1}}, ["logit_bias", "'a'", "token ids"]),
        ({"logit_bias": {"1": "2"}}, ["logit_bias.1", "'2'", "a number"]),
        ({"logit_bias": {str(one): 1 for one in range(200_000)}}, ["logit_bias", "200000 tokens", "up to 1024"]),
        ({"stop_token_ids": ["3"]}, ["stop_token_ids", "token ids"]),
        ({"ignore_eos": 1}, ["ignore_eos", "true or false"]),
    ],
)
def test_invalid_or_unsupported_field_is_refused_by_name(fields: dict[str, object], words: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        ChatRequest.read(FIELDS | fields, DEFAULTS)
    assert all(word in str(error.value) for word in words)


def test_a_schema_of_llama_cpp_is_that_of_openai() -> None:
    schema = {"type": "array", "items": {"type": "integer"}}
    formats = [{"type": "json_object", "schema": schema}, {"type": "json_schema", "json_schema": {"schema": schema}}]
    requests = [ChatRequest.read(FIELDS | {"response_format": one}, DEFAULTS) for one in formats]
    assert requests[0] == requests[1]
    assert requests[0] != ChatRequest.read(FIELDS | {"response_format": {"type": "json_object"}}, DEFAULTS)


def test_neutral_fields_are_ignored() -> None:
    neutral = {"n": 1, "tools": None, "logprobs": False, "frequency_penalty": 0, "user": "me", "top_p": None}
    assert ChatRequest.read(FIELDS | neutral, DEFAULTS) == ChatRequest.read(FIELDS, DEFAULTS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 2),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("guided_json", {"type": "object"}),
        ("echo", True),
        ("typical_p", 0.9),
    ],
)
def test_a_field_that_would_change_the_answer_is_honoured_or_refused(name: str, value: object) -> None:
    with http_client(new_station()) as client:
        response = complete(client, **{name: value})
    assert response.status_code == 400
    assert f"{name} is" in response.json()["error"]["message"]
    assert "left out" in response.json()["error"]["message"]


def test_sampling_settings_of_a_request_reach_the_base_station() -> None:
    fields: dict[str, Any] = {
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 1,
        "logit_bias": {"7": 3, "5": -100},
        "min_tokens": 5,
        "ignore_eos": True,
        "stop_token_ids": [9],
    }
    sampling = ChatRequest.read(FIELDS | fields, DEFAULTS).choices[0].settings.sampling
    assert sampling == Sampling(0, 0, 1, 0, 0.1, 1.2, 0.5, 1.0, ((7, 3.0), (5, -100.0)), 5, True, (9,))
    with http_client(new_station()) as client:
        assert content_of(complete(client, **fields)) == text_of(slow_answer(TARGET, sampling, PROMPT, 12, ()))
        refused = complete(client, stop_token_ids=[20])
        assert refused.status_code == 400
        assert "token ids from 0 to 19" in refused.json()["error"]["message"]
        assert content_of(complete(client)) == text_of(target_alone(TARGET, PROMPT, 12))


def test_a_response_format_restricts_the_answer() -> None:
    schema = {"type": "array", "items": {"enum": [1, True, "a"]}, "maxItems": 3}
    json_schema = {"type": "json_schema", "json_schema": {"name": "list", "schema": schema}}
    target = FakeTarget.make(TARGET, frozenset({json_tokens.STOP}), grammar_compiler=json_tokens.COMPILER)
    with http_client(Station(target)) as client:
        for fields in ({"response_format": json_schema}, {"grammar": 'start: "[" "1" "]"'}, {"regex": "[0-3]{4}"}):
            choice = complete(client, max_tokens=40, **fields).json()["choices"][0]
            text = json_tokens.text_of([int(word) for word in choice["message"]["content"].split()])
            assert choice["finish_reason"] == "stop"
            assert "regex" in fields or set(json.loads(text)) <= {1, "a"}
        for refused in ({"regex": "("}, {"response_format": {"type": "json_schema", "json_schema": {"schema": BAD}}}):
            response = complete(client, **refused)
            assert response.status_code == 400
            assert "cannot be compiled" in response.json()["error"]["message"]
        assert complete(client).status_code == 200
    with http_client(new_station()) as client:
        response = complete(client, response_format={"type": "json_object"})
        assert (response.status_code, "has no grammars" in response.text) == (400, True)


BAD = {"type": "object", "propertyNames": {"pattern": "a"}}


def test_the_last_message_is_continued_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def encode_chat(_: object, messages: Sequence[ChatMessage], __: object, continue_final: bool) -> list[int]:
        asked.append(continue_final)
        return NumberTokenizer().encode(" ".join(message["content"] for message in messages))

    monkeypatch.setattr(NumberTokenizer, "encode_chat", encode_chat)
    begun = [*FIELDS["messages"], {"role": "assistant", "content": "9"}]  # type: ignore[misc]
    with http_client(new_station()) as client:
        continued = complete(client, messages=begun, continue_final_message=True, add_generation_prompt=False)
        complete(client, messages=begun)
        refused = [
            complete(client, continue_final_message=True),
            complete(client, add_generation_prompt=False),
            complete(client, messages=begun, continue_final_message=True, add_generation_prompt=True),
        ]
    assert content_of(continued) == text_of(target_alone(TARGET, [*PROMPT, 9], 12))
    assert asked == [True, False]
    assert [one.json()["error"]["param"] for one in refused] == [
        "continue_final_message",
        "add_generation_prompt",
        "add_generation_prompt",
    ]


def test_top_k_of_a_request_limits_what_is_sampled() -> None:
    """With one candidate a sampled answer is the greedy one."""
    with http_client(new_station()) as client:
        assert content_of(complete(client, temperature=1.5, top_k=1)) == text_of(target_alone(TARGET, PROMPT, 12))
    assert ChatRequest.read(FIELDS | {"top_k": -1}, DEFAULTS).choices[0].settings.sampling.top_k == 0


def test_minus_one_is_a_random_seed_and_no_limit_of_tokens() -> None:
    requests = [ChatRequest.read(FIELDS | {"temperature": 1, "seed": -1}, DEFAULTS).choices[0] for _ in range(2)]
    assert requests[0].settings.sampling.seed != requests[1].settings.sampling.seed
    station = Station(FakeTarget.make(TARGET, context_length=40))
    with http_client(station) as client:
        usage = complete(client, max_tokens=-1).json()["usage"]
    assert usage["total_tokens"] == 40


def test_messages_are_read_as_their_senders_mean_them() -> None:
    messages = [
        {"role": "developer", "content": "3 1"},
        {"role": "user", "content": "4"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": "1 5"},
    ]
    read = ChatRequest.read(FIELDS | {"messages": messages}, DEFAULTS).choices[0].prompt
    assert [(one["role"], one["content"]) for one in read if isinstance(one, dict)] == [
        ("system", "3 1"),
        ("user", "4"),
        ("assistant", ""),
        ("user", "1 5"),
    ]


def test_content_may_be_a_list_of_text_parts() -> None:
    parts = [{"type": "text", "text": "3 1 4 "}, {"type": "text", "text": "1 5"}]
    messages = [{"role": "user", "content": parts}]
    assert ChatRequest.read(FIELDS | {"messages": messages}, DEFAULTS) == ChatRequest.read(FIELDS, DEFAULTS)
