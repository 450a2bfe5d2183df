"""OpenAI's Python client against a running pair, whose addresses and key are in the environment."""

import asyncio
import json
import os
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

URL, KEY, DOWN_URL = (os.environ[f"EDGEDRAFT_{name}"] for name in ("URL", "API_KEY", "DOWN_URL"))
QUESTION: Any = [{"role": "user", "content": "Name three rivers of Europe."}]
SECONDS = 120


@pytest.fixture
def client() -> Iterator[OpenAI]:
    with OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=SECONDS) as client:
        yield client


def ask(client: OpenAI, messages: Any = QUESTION, **fields: Any) -> Any:
    return client.chat.completions.create(model="sample", messages=messages, **{"max_tokens": 16} | fields)


def text(answer: Any) -> str:
    content: str = answer.choices[0].message.content
    return content


def streamed(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_a_stream_has_the_text_and_usage_of_the_whole_answer(client: OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert streamed(chunks) == text(whole)
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert whole.usage.completion_tokens == 16


def test_max_tokens_limits_an_answer(client: OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(client, **{"max_tokens": None, name: 3})
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_stop_ends_an_answer(client: OpenAI) -> None:
    whole = text(ask(client))
    stop = whole[5:10]
    answer = ask(client, stop=[stop])
    assert (text(answer), answer.choices[0].finish_reason) == (whole.partition(stop)[0], "stop")


def test_a_seed_repeats_an_answer(client: OpenAI) -> None:
    texts = [text(ask(client, temperature=1.0, seed=seed)) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_developer_messages_and_parts_are_read(client: OpenAI) -> None:
    parts = [{"type": "text", "text": "Name three "}, {"type": "text", "text": "rivers of Europe."}]
    rules = "Answer briefly."
    answers = [
        text(ask(client, [{"role": role, "content": rules}, {"role": "user", "content": content}]))
        for role, content in (("developer", parts), ("system", QUESTION[0]["content"]))
    ]
    assert answers[0] == answers[1]


def test_two_conversations_take_turns(client: OpenAI) -> None:
    conversations: list[list[Any]] = [[{"role": "user", "content": f"Tell me about {name}."}] for name in ("A", "B")]
    for _ in range(2):
        for messages in conversations:
            answer = text(ask(client, messages))
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Go on."}]
    alone = conversations[0][:2]
    repeated = text(ask(client, alone[:1]))
    assert repeated == alone[1]["content"]


def test_an_error_has_its_class_and_names_the_field(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as unsupported:
        ask(client, n=9)
    assert unsupported.value.param == "n"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, [{"role": "user", "content": "river " * 9000}])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert unknown.value.code == "model_not_found"


def test_an_answer_is_parsed_into_a_model(client: OpenAI) -> None:
    class River(BaseModel):
        name: str = Field(max_length=20)
        countries: list[Literal["France", "Germany", "Italy"]] = Field(max_length=2)

    parsed = client.chat.completions.parse(
        model="sample", messages=QUESTION, response_format=River, max_tokens=200, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, River)


def test_a_required_tool_is_called_and_its_result_answered(client: OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    asked: Any = [{"role": "user", "content": "How is the weather in Rome?"}]
    choice = ask(client, asked, tools=tools, tool_choice="required", max_tokens=80).choices[0]
    call = choice.message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "weather")
    assert arguments["city"] in ("Oslo", "Rome")
    assert 1 <= arguments["days"] <= 9
    chunks = list(ask(client, asked, tools=tools, tool_choice="required", max_tokens=80, stream=True))
    deltas = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or []]
    assert "".join(one.function.arguments for one in deltas) == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    assert text(ask(client, [*asked, choice.message, result], tools=tools, tool_choice="none"))


def test_log_probabilities_and_choices(client: OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=2, n=2, seed=1, temperature=1.0)
    assert len({choice.message.content for choice in answer.choices}) == 2
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert "".join(one.token for one in choice.logprobs.content).startswith(choice.message.content or "")
        assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in choice.logprobs.content)


def test_texts_are_completed_and_echoed(client: OpenAI) -> None:
    text = "The capital of France is"
    plain = client.completions.create(model="sample", prompt=[text, "One, two,"], max_tokens=8, temperature=0)
    echoed = client.completions.create(
        model="sample", prompt=text, max_tokens=8, temperature=0, echo=True, logprobs=1
    ).choices[0]
    assert len(plain.choices) == 2
    assert echoed.text == text + plain.choices[0].text
    told: Any = echoed.logprobs
    assert told.token_logprobs[0] is None
    assert all(one <= 0 for one in told.token_logprobs[1:])


def test_penalties_and_bias_change_the_answer(client: OpenAI) -> None:
    plain, penalized = (text(ask(client, frequency_penalty=penalty, max_tokens=48)) for penalty in (0, 2))
    assert plain != penalized


def test_a_wrong_key_is_an_authentication_error(client: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as wrong:
        ask(client.with_options(api_key="sk-wrong"))
    assert wrong.value.code == "invalid_api_key"
    assert client.models.list().data[0].id == "sample"


def test_an_unreachable_base_station_is_a_server_error(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as down:
        ask(client.with_options(base_url=DOWN_URL))
    assert (down.value.status_code, down.value.code) == (503, "link")


def test_a_stream_that_is_closed_makes_room_for_the_next_answer(client: OpenAI) -> None:
    expected = text(ask(client))
    for _ in range(3):
        with ask(client, max_tokens=4000, stream=True) as chunks:
            next(iter(chunks))
        assert text(ask(client)) == expected


def test_a_whole_answer_that_times_out_makes_room_for_the_next(client: OpenAI) -> None:
    expected = text(ask(client))
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=1), [{"role": "user", "content": "river " * 6000}], max_tokens=1000)
    assert text(ask(client)) == expected


def test_a_full_queue_is_a_rate_limit_error_and_empties_when_its_clients_leave(client: OpenAI) -> None:
    assert asyncio.run(_code_when_too_many_ask()) == "rate_limit_exceeded"
    assert ask(client).usage.completion_tokens == 16


async def _code_when_too_many_ask() -> str | None:
    """Ask more often than the queue is long; leave as soon as one request is refused."""
    async with AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=SECONDS) as client:
        create = client.chat.completions.create
        requests = {
            asyncio.ensure_future(create(model="sample", messages=QUESTION, max_tokens=4000)) for _ in range(20)
        }
        done, waiting = await asyncio.wait(requests, return_when=asyncio.FIRST_EXCEPTION)
        for request in waiting:
            request.cancel()
        errors = [request.exception() for request in done]
        await asyncio.gather(*waiting, return_exceptions=True)
        return next(error.code for error in errors if isinstance(error, openai.RateLimitError))
