"""A request of OpenAI's text completions API, validated and turned into requests to the worker."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from device.answers.job import AnswerRequest
from device.http.answer_fields import Defaults, Streaming, check_names, choices_of, read_answer
from device.http.http_fields import MAX_PROMPTS, TEXT_FIELDS
from device.http.request_fields import Fields, field
from device.text.unicode import check_unicode
from protocol.errors import SettingsError

_PROMPT = "a text, a list of texts, token ids, or a list of lists of token ids"


@dataclass(frozen=True)
class TextRequest:
    """Requests to the worker, one for each choice of each prompt, and how the answers are returned.

    ``per_prompt`` is how many choices each prompt has.
    """

    choices: tuple[AnswerRequest, ...]
    per_prompt: int
    streaming: Streaming

    @classmethod
    def read(cls, fields: Any, defaults: Defaults) -> "TextRequest":
        """Validate the parsed JSON body of a request.

        Raises:
            SettingsError: a field is missing, has a value that is not allowed, or is not supported.
        """
        check_names(fields, TEXT_FIELDS)
        logprobs = field(fields, "logprobs", int, None, "a whole number")
        answer = read_answer(fields, "", defaults, logprobs)
        answers = [choices_of(fields, replace(answer, prompt=prompt)) for prompt in _prompts(fields)]
        return cls(tuple(chain.from_iterable(answers)), len(answers[0]), Streaming.read(fields))


def _prompts(fields: Fields) -> Sequence[str | tuple[int, ...]]:
    given = field(fields, "prompt", (str, list), [], _PROMPT)
    prompts = [given] if isinstance(given, str) or (given and _are_ids(given)) else given
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise SettingsError("prompt", f"{len(prompts)} prompts", f"1 to {MAX_PROMPTS}")
    return [_prompt(prompt) for prompt in prompts]


def _prompt(prompt: Any) -> str | tuple[int, ...]:
    if isinstance(prompt, str) and prompt:
        check_unicode("prompt", prompt)
        return prompt
    if isinstance(prompt, list) and prompt and _are_ids(prompt):
        return tuple(prompt)
    raise SettingsError("prompt", prompt, f"{_PROMPT}, none of them empty")


def _are_ids(values: Sequence[Any]) -> bool:
    return all(type(value) is int for value in values)
