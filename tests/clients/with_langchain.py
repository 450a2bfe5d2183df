"""LangChain's ChatOpenAI against a running pair, whose addresses and key are in the environment."""

import os
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

URL, KEY, DOWN_URL = (os.environ[f"EDGEDRAFT_{name}"] for name in ("URL", "API_KEY", "DOWN_URL"))
QUESTION = "Name three rivers of Europe."


def chat(**fields: Any) -> Any:
    settings = {"model": "sample", "base_url": URL, "api_key": KEY, "max_tokens": 16, "max_retries": 0, "timeout": 120}
    return ChatOpenAI(**(settings | fields))


def test_a_stream_has_the_text_and_usage_of_the_whole_answer() -> None:
    whole = chat().invoke(QUESTION)
    chunks = list(chat(stream_usage=True).stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert whole.usage_metadata["output_tokens"] == 16
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [16]


def test_stop_seed_and_max_tokens_are_honoured() -> None:
    whole = chat().invoke(QUESTION).content
    stop = whole[5:10]
    assert chat().invoke(QUESTION, stop=[stop]).content == whole.partition(stop)[0]
    assert chat(max_tokens=3).invoke(QUESTION).usage_metadata["output_tokens"] == 3
    texts = [chat(temperature=1.0, seed=seed).invoke(QUESTION).content for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_developer_messages_and_parts_are_read() -> None:
    parts: Any = [{"type": "text", "text": "Name three "}, {"type": "text", "text": "rivers of Europe."}]
    as_developer = SystemMessage("Answer briefly.", additional_kwargs={"__openai_role__": "developer"})
    answers = [
        chat().invoke([rules, HumanMessage(content)]).content
        for rules, content in ((as_developer, parts), (SystemMessage("Answer briefly."), QUESTION))
    ]
    assert answers[0] == answers[1]


def test_two_conversations_take_turns() -> None:
    conversations: list[list[Any]] = [[HumanMessage(f"Tell me about {name}.")] for name in ("A", "B")]
    for _ in range(2):
        for messages in conversations:
            messages += [AIMessage(chat().invoke(messages).content), HumanMessage("Go on.")]
    assert chat().invoke(conversations[0][:1]).content == conversations[0][1].content


class River(BaseModel):
    """A river of Europe."""

    name: str = Field(max_length=20)
    countries: list[Literal["France", "Germany", "Italy"]] = Field(max_length=2)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_has_the_structure_of_a_class(method: str) -> None:
    answer = chat(max_tokens=200, temperature=0).with_structured_output(River, method=method).invoke(QUESTION)
    assert isinstance(answer, River)


def test_a_bound_tool_is_called() -> None:
    message = chat(max_tokens=200, temperature=0).bind_tools([River], tool_choice="required").invoke(QUESTION)
    assert [call["name"] for call in message.tool_calls] == ["River"]
    River(**message.tool_calls[0]["args"])


def test_errors_have_their_classes() -> None:
    with pytest.raises(openai.BadRequestError, match="top_p"):
        chat(top_p=0).invoke(QUESTION)
    with pytest.raises(openai.BadRequestError) as long:
        chat().invoke("river " * 9000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        chat(model="gpt-4").invoke(QUESTION)
    with pytest.raises(openai.AuthenticationError):
        chat(api_key="sk-wrong").invoke(QUESTION)
    with pytest.raises(openai.InternalServerError):
        chat(base_url=DOWN_URL).invoke(QUESTION)


def test_a_stream_that_is_closed_makes_room_for_the_next_answer() -> None:
    expected = chat().invoke(QUESTION).content
    chunks = chat(max_tokens=4000).stream(QUESTION)
    next(chunks)
    chunks.close()
    assert chat().invoke(QUESTION).content == expected
