"""Prompts for measurements: a small built-in set, or a file of the user's."""

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from protocol.errors import SettingsError

OWN_PROMPTS = (
    "Explain to a ten-year-old why the sky is blue but sunsets are red.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "List five practical tips for saving electricity at home, with one sentence on each.",
    "A train leaves at 9:40 and travels 210 km at 70 km/h. When does it arrive? Show each step.",
    "Write a Python function that returns the longest word of a sentence, and explain how it works.",
    "Summarise the main causes of the First World War in three paragraphs.",
    "Translate into French: The meeting has been moved to Thursday afternoon because the room is taken.",
    "Describe how a refrigerator keeps food cold.",
    "Give me a recipe for a simple vegetable soup for four people.",
    "What are the differences between a virus and a bacterium?",
    "Write a polite email asking a landlord to repair a leaking tap.",
    "Compare the advantages of bicycles and buses in a large city.",
    "Write a poem of eight lines about the first snow of winter.",
    "How do I prepare for a job interview as a software tester?",
    "Explain what photosynthesis is and why it matters.",
    "Three friends share a bill of 84 dollars; one pays twice as much as each of the others. How much does each pay?",
    "Write a SQL query that lists the ten customers with the most orders, and explain it.",
    "Give a short biography of Marie Curie.",
    "What should a visitor see in Rome on a single day? Make a plan by the hour.",
    "Argue for and against homework in primary schools.",
)
_LINES = 'a file of lines like {"turns": ["…"]}'


def read_prompts(path: Path | None, count: int) -> list[str]:
    """The first ``count`` prompts: the built-in ones, or the first turns of a Spec-Bench file.

    A Spec-Bench file has a JSON object per line, with the user messages in ``turns``. Of its categories each gives its
    first prompt, then its second, and so on, since how well a model drafts depends on the category.

    Raises:
        SettingsError: the file has another format, or there are fewer prompts.
    """
    prompts = list(OWN_PROMPTS) if path is None else _in_turns(_questions(path))
    if not prompts:
        raise SettingsError("prompts", str(path), "a file with at least one prompt")
    if not 1 <= count <= len(prompts):
        raise SettingsError("count", count, f"1 to {len(prompts)}, the number of prompts")
    return prompts[:count]


def prompts_by_category(path: Path, most: int) -> dict[str, list[str]]:
    """The first ``most`` prompts of each category of a Spec-Bench file, or all where it has fewer.

    Raises:
        SettingsError: the file has another format; each line also needs a ``category``.
    """
    return {category: prompts[:most] for category, prompts in _by_category(_questions(path, "category")).items()}


def _in_turns(questions: Sequence[dict[str, Any]]) -> list[str]:
    """The first turns of questions, one of each category after the other."""
    turns = zip_longest(*_by_category(questions).values())
    return [prompt for turn in turns for prompt in turn if prompt is not None]


def _by_category(questions: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The first turns of questions; those without a category have one together."""
    by_category: dict[str, list[str]] = {}
    for question in questions:
        by_category.setdefault(str(question.get("category")), []).append(str(question["turns"][0]))
    return by_category


def _questions(path: Path, *names: str) -> list[dict[str, Any]]:
    """The objects of a Spec-Bench file, which have ``names`` and at least one turn."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line) for line in lines if line.strip()]
        wrong = [one for one in questions if not (isinstance(one["turns"], list) and isinstance(one["turns"][0], str))]
        _ = [question[name] for question in questions for name in names]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SettingsError("prompts", str(path), f"{_LINES} ({error!r})") from error
    if wrong:
        raise SettingsError("prompts", str(path), f"{_LINES} (turns are {wrong[0]['turns']!r:.40})")
    return questions
