"""Pydantic AI against a running pair, whose addresses and key are in the environment."""

import os
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, KEY = (os.environ[f"EDGEDRAFT_{name}"] for name in ("URL", "API_KEY"))
MODEL = OpenAIChatModel("sample", provider=OpenAIProvider(base_url=URL, api_key=KEY))
QUESTION = "Name a river of Europe."


class River(BaseModel):
    """A river of Europe."""

    name: str = Field(max_length=20)
    countries: list[Literal["France", "Germany", "Italy"]] = Field(max_length=2)


@pytest.mark.parametrize("output", [ToolOutput(River), NativeOutput(River)], ids=["tool", "schema"])
def test_an_agent_returns_an_object_of_the_class(output: Any) -> None:
    agent: Any = Agent(MODEL, output_type=output, model_settings={"max_tokens": 200, "temperature": 0})
    assert isinstance(agent.run_sync(QUESTION).output, River)


def test_an_agent_returns_text() -> None:
    agent: Any = Agent(MODEL, model_settings={"max_tokens": 16, "temperature": 0})
    result = agent.run_sync(QUESTION)
    assert result.output
