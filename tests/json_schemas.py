"""Bounded JSON schemas, made from a number, and what a pair answers under them."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from jsonschema import Draft202012Validator

from bench.setup.bench_setup import BenchSetup
from common.grammar import schema_grammar
from device.settings import DraftSettings
from protocol.messages import Mode, Sampling

MOST_TOKENS = 256
DRAFT_LEN = 8
Schema: TypeAlias = dict[str, Any]

_THINGS = ("a person", "a ship", "a recipe", "a book", "a city", "a song", "an order", "a planet")
_NAMES = ("name", "kind", "size", "color", "count", "notes", "ready", "parts", "price", "code", "year", "tags")
_WORDS = ("red", "green", "blue", "small", "large", "north", "south", "open", "closed", "new")
_PATTERNS = ("^[A-Z]{2}-[0-9]{1,3}$", "^[a-z]{3,8}$", "^(yes|no)[.!]?$", "^[0-9]{4}-[0-9]{2}$")


def prompt_of(index: int) -> str:
    """The question that goes with a schema."""
    return f"Describe {_THINGS[index % len(_THINGS)]} as JSON."


def schema_of(index: int) -> Schema:
    """One of the schemas: an object whose texts, lists and numbers have limits."""
    rng = random.Random(index)  # noqa: S311 - not a secret
    schema = _object(rng, depth=0)
    if index % 5 == 0:  # two references to one definition
        schema["$defs"] = {"part": _value(rng, depth=2)}
        schema["properties"] |= {name: {"$ref": "#/$defs/part"} for name in ("first", "second")}
        schema["required"] = [*schema["required"], "first"]
    return schema


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_NAMES, rng.randint(1, 4 - depth))
    return {
        "type": "object",
        "properties": {name: _value(rng, depth + 1) for name in names},
        "required": names[: rng.randint(1, len(names))],
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int) -> Schema:
    kinds = [_text, _pattern, _integer, _number, _choice, _constant]
    makers = [*kinds, _object, _list, _either] if depth < 3 else kinds
    make = rng.choice(makers)
    return make(rng, depth)


def _text(rng: random.Random, _: int) -> Schema:
    return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(4, 24)}


def _pattern(rng: random.Random, _: int) -> Schema:
    return {"type": "string", "pattern": rng.choice(_PATTERNS)}


def _integer(rng: random.Random, _: int) -> Schema:
    least = rng.randint(-50, 1000)
    return {"type": "integer", "minimum": least, "maximum": least + rng.randint(1, 5000)}


def _number(rng: random.Random, _: int) -> Schema:
    return {"type": "number", "minimum": 0, "maximum": rng.randint(1, 99), "multipleOf": 0.25}


def _choice(rng: random.Random, _: int) -> Schema:
    return {"enum": [*rng.sample(_WORDS, 3), rng.randint(0, 9), None]}


def _constant(rng: random.Random, _: int) -> Schema:
    return {"const": rng.choice([*_WORDS, True, 7])} if rng.random() < 0.5 else {"type": "boolean"}


def _list(rng: random.Random, depth: int) -> Schema:
    return {"type": "array", "items": _value(rng, depth + 1), "minItems": rng.randint(0, 1), "maxItems": 3}


def _either(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_value(rng, depth + 1), {"type": "null"}]}


@dataclass
class SchemaFigures:
    """What was counted over some schemas; ``unmasked`` is of drafts without the grammar."""

    answers: int = 0
    finished: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    unmasked_drafted: int = 0
    unmasked_accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Of the drafts."""
        return self.accepted / self.drafted

    @property
    def unmasked_acceptance(self) -> float:
        """Of drafts without the grammar."""
        return self.unmasked_accepted / self.unmasked_drafted


def answer_schemas(setup: BenchSetup, indices: Iterable[int]) -> SchemaFigures:
    """Answer each schema coupled, with a seed; finished answers are valid, and the target's own token for token."""
    figures = SchemaFigures()
    for index in indices:
        schema = schema_of(index)
        sampling = Sampling(0.8, seed=index, grammar=schema_grammar(schema))
        coupled = DraftSettings(Mode.COUPLED, sampling, 1, DRAFT_LEN)
        ids = setup.prompt_ids(prompt_of(index))
        answer = setup.answer(ids, MOST_TOKENS, coupled)
        alone = setup.answer(ids, MOST_TOKENS, DraftSettings(Mode.TARGET, sampling, 1, DRAFT_LEN))
        assert answer.token_ids == alone.token_ids, f"schema {index}"
        figures.answers += 1
        figures.tokens += len(answer.token_ids)
        figures.drafted, figures.accepted = figures.drafted + answer.drafted, figures.accepted + answer.accepted
        if answer.finish_reason == "stop":
            figures.finished += 1
            Draft202012Validator(schema).validate(json.loads(answer.text))
        _add_unmasked(figures, setup, ids, coupled)
    return figures


def _add_unmasked(figures: SchemaFigures, setup: BenchSetup, ids: Sequence[int], settings: DraftSettings) -> None:
    session = setup.session(settings, [*ids])  # drafts without the grammar
    for _ in session.answer(MOST_TOKENS):
        pass
    figures.unmasked_drafted += session.counters.drafted
    figures.unmasked_accepted += session.counters.accepted
    session.close()
