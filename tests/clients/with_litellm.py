"""LiteLLM against a running pair, whose addresses and key are in the environment."""

import os
from typing import Any

import litellm
import pytest

URL, KEY, DOWN_URL = (os.environ[f"EDGEDRAFT_{name}"] for name in ("URL", "API_KEY", "DOWN_URL"))
QUESTION = [{"role": "user", "content": "Name three rivers of Europe."}]
SECONDS = 120


def ask(messages: Any = QUESTION, **fields: Any) -> Any:
    settings = {"model": "openai/sample", "base_url": URL, "api_key": KEY, "max_tokens": 16, "max_retries": 0}
    return litellm.completion(messages=messages, timeout=SECONDS, **(settings | fields))


def text(answer: Any) -> str:
    content: str = answer.choices[0].message.content
    return content


def test_a_stream_has_the_text_and_usage_of_the_whole_answer() -> None:
    whole = ask()
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text(whole)
    assert whole.usage.completion_tokens == 16
    assert [chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)] == [16]


def test_stop_seed_and_max_tokens_are_honoured() -> None:
    whole = text(ask())
    stop = whole[5:10]
    assert text(ask(stop=[stop])) == whole.partition(stop)[0]
    assert ask(max_tokens=3).usage.completion_tokens == 3
    texts = [text(ask(temperature=1.0, seed=seed)) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_developer_messages_and_parts_are_read() -> None:
    parts = [{"type": "text", "text": "Name three "}, {"type": "text", "text": "rivers of Europe."}]
    rules = "Answer briefly."
    answers = [
        text(ask([{"role": role, "content": rules}, {"role": "user", "content": content}]))
        for role, content in (("developer", parts), ("system", QUESTION[0]["content"]))
    ]
    assert answers[0] == answers[1]


def test_two_conversations_take_turns() -> None:
    conversations: list[list[Any]] = [[{"role": "user", "content": f"Tell me about {name}."}] for name in ("A", "B")]
    for _ in range(2):
        for messages in conversations:
            answer = text(ask(messages))
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Go on."}]
    assert text(ask(conversations[0][:1])) == conversations[0][1]["content"]


def test_errors_have_their_classes() -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(temperature=-1)
    with pytest.raises(litellm.ContextWindowExceededError):
        ask([{"role": "user", "content": "river " * 9000}])
    with pytest.raises(litellm.NotFoundError, match="gpt-4"):
        ask(model="openai/gpt-4")
    with pytest.raises(litellm.AuthenticationError):
        ask(api_key="sk-wrong")
    with pytest.raises((litellm.ServiceUnavailableError, litellm.InternalServerError)):
        ask(base_url=DOWN_URL)


def test_a_stream_that_is_closed_makes_room_for_the_next_answer() -> None:
    expected = text(ask())
    chunks = ask(max_tokens=4000, stream=True)
    next(iter(chunks))
    chunks.completion_stream.response.close()
    assert text(ask()) == expected
