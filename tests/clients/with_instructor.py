"""instructor against a running pair, whose addresses and key are in the environment."""

import os
from typing import Any, Literal

import instructor
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

URL, KEY = (os.environ[f"EDGEDRAFT_{name}"] for name in ("URL", "API_KEY"))
QUESTION: Any = [{"role": "user", "content": "Name a river of Europe."}]


class River(BaseModel):
    """A river of Europe."""

    name: str = Field(max_length=20)
    countries: list[Literal["France", "Germany", "Italy"]] = Field(max_length=2)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_an_answer_is_an_object_of_the_class(mode: str) -> None:
    with OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=120) as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode[mode])
        river = client.chat.completions.create(
            model="sample", messages=QUESTION, response_model=River, max_tokens=200, temperature=0, max_retries=0
        )
    assert isinstance(river, River)
