"""Grammars: what they allow follows from the answer's tokens alone, and none takes a process down."""

import json
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import AddedToken, Tokenizer

from common.common_prefix import common_prefix
from common.grammar import GrammarCompiler, lark_grammar, regex_grammar, schema_grammar
from common.grammar_matcher import SLICES
from protocol.errors import GrammarError
from tests.hostile_grammars import STOP as END
from tests.hostile_grammars import VOCAB as BYTES
from tests.hostile_grammars import tokenizer_json
from tests.json_tokens import COMPILER, PIECES, STOP, text_of

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 30}, "b": {"enum": ["c", True, None]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": schema_grammar(SCHEMA),
    "list": schema_grammar({"type": "array", "items": {"type": "boolean"}, "maxItems": 3}),
    "lark": lark_grammar('start: "a" ("b" | "c")+ "x"'),
    "regex": regex_grammar("[ab]{2,4}c*"),
}


@pytest.mark.parametrize("text", GRAMMARS.values(), ids=GRAMMARS)
def test_a_state_does_not_depend_on_the_tokens_that_were_rolled_back(text: str) -> None:
    rng = random.Random(1)  # noqa: S311 - not a secret
    moving, answer = COMPILER.compile(text), list[int]()
    for _ in range(200):
        fresh = COMPILER.compile(text)
        assert moving.follow(answer)
        assert fresh.follow(answer)
        np.testing.assert_array_equal(moving.allowed(), fresh.allowed())
        allowed = np.flatnonzero(fresh.allowed()).tolist()
        answer = [*answer, rng.choice(allowed)] if rng.random() < 0.7 else answer[: rng.randrange(len(answer) + 1)]
        answer = answer[:-1] if answer[-1:] == [STOP] else answer


@pytest.mark.parametrize("text", GRAMMARS.values(), ids=GRAMMARS)
def test_at_its_end_only_stop_ids_are_allowed(text: str) -> None:
    rng = random.Random(2)  # noqa: S311 - not a secret
    for _ in range(20):
        grammar, answer = COMPILER.compile(text), list[int]()
        while STOP not in answer and len(answer) < 100:
            assert grammar.follow(answer)
            answer.append(rng.choice(np.flatnonzero(grammar.allowed()).tolist()))
        assert answer[-1] == STOP
        assert grammar.follow(answer)
        assert not grammar.follow([*answer, STOP])
        if text.startswith('{"grammars":[{"json_schema"'):
            json.loads(text_of(answer))


class Words:
    """Every byte, and words of up to 40 characters."""

    eos_token_id = STOP_WORD = 256
    bos_token_id = None
    special_token_ids = (STOP_WORD,)
    tokens = (
        *(bytes([byte]) for byte in range(256)),
        b"<stop>",
        *(
            f"{start}{end * length}".encode()
            for start in ("", " ", '"', "é")
            for end in "aé"
            for length in range(1, 41)
        ),
    )

    def __call__(self, text: bytes) -> list[int]:
        return [*text]


@pytest.mark.parametrize("schema", [{"maxLength": 12}, {"maxLength": 40}, {"pattern": "^[a-z ]{2,9}$"}, {}])
def test_slices_change_no_mask(schema: dict[str, Any]) -> None:
    rng, text = random.Random(3), schema_grammar({"type": "string", **schema})  # noqa: S311 - not a secret
    sliced, plain = (
        GrammarCompiler(partial(LLTokenizer, TokenizerWrapper(Words()), slices=slices), len(Words.tokens)).compile(text)
        for slices in (list(SLICES), [])
    )
    for _ in range(10):
        answer = list[int]()
        while Words.STOP_WORD not in answer and len(answer) < 20:
            assert sliced.follow(answer)
            assert plain.follow(answer)
            np.testing.assert_array_equal(sliced.allowed(), plain.allowed())
            answer.append(rng.choice(np.flatnonzero(plain.allowed()).tolist()))


def test_a_token_that_is_not_allowed_leaves_the_state_as_it_was() -> None:
    grammar = COMPILER.compile(GRAMMARS["regex"])
    a, x = PIECES.index("a"), PIECES.index("x")
    assert grammar.follow([a])
    assert not grammar.follow([a, x, a])
    assert not grammar.error
    assert grammar.follow([a, a])


def test_a_forced_token_is_the_only_one_allowed() -> None:
    grammar = COMPILER.compile(GRAMMARS["lark"])
    assert grammar.follow([])
    assert grammar.forced() == PIECES.index("a")
    assert np.flatnonzero(grammar.allowed()).tolist() == [PIECES.index("a")]
    assert grammar.follow([PIECES.index("a")])
    assert grammar.forced() is None


def test_an_ambiguous_grammar_ends_with_an_error_after_some_tokens() -> None:
    grammar = COMPILER.compile(lark_grammar('start: s\ns: s s | "a" | "b"'))
    assert not grammar.follow([PIECES.index("a")] * 6000)
    assert "items" in grammar.error
    assert not grammar.follow([])


def test_a_grammar_that_takes_longer_than_it_may_ends_with_an_error() -> None:
    grammar = COMPILER.compile(GRAMMARS["regex"])
    assert not grammar.follow([PIECES.index("a")] * 2, seconds=0)
    assert grammar.error == "it takes more than 0 s"


def test_a_long_answer_is_compared_token_by_token_only_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks of a round are given a bounded time, which an honest answer of any length must not exceed."""
    compared = list[int]()

    def counted(one: Sequence[int], other: Sequence[int]) -> int:
        compared.append(min(len(one), len(other)))
        return common_prefix(one, other)

    monkeypatch.setattr("common.grammar.common_prefix", counted)
    text, a, b = lark_grammar('start: ("a" | "b")*'), PIECES.index("a"), PIECES.index("b")
    moving, drafted = COMPILER.compile(text), [b, a, b]
    for length in range(0, 1500, 50):
        assert moving.follow([a] * length)
        assert all(map(moving.advance, drafted))
    assert max(compared) <= 256
    changed = [b, *[a] * 1400]
    fresh = COMPILER.compile(text)
    assert moving.follow([*changed, b]) is fresh.follow([*changed, b]) is True
    assert vars(moving)["_tokens"].tolist() == [*changed, b]


def test_a_copy_has_the_same_state_and_does_not_follow_the_original() -> None:
    grammar = COMPILER.compile(GRAMMARS["lark"])
    assert grammar.follow([PIECES.index("a")])
    copied = grammar.copy()
    assert grammar.advance(PIECES.index("b"))
    assert np.flatnonzero(copied.allowed()).tolist() == [PIECES.index("b"), PIECES.index("c")]
    assert copied.follow([])
    assert copied.forced() == PIECES.index("a")


def schema_of(schema: dict[str, Any]) -> str:
    return schema_grammar(schema)


HOSTILE = {
    "not a grammar": "{",
    "deep Lark": lark_grammar("start: " + "(" * 16_000 + '"a"' + ")" * 16_000),
    "deep JSON": '{"grammars":[{"json_schema":' + '{"items":' * 5000 + "{}" + "}" * 5000 + "}]}",
    "deep regex": regex_grammar("(" * 16_000 + "a" + ")" * 16_000),
    "product of choices": schema_of(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{index}_{choice}": {"type": "string"}}} for choice in range(4)]}
                for index in range(12)
            ]
        }
    ),
    "no text": schema_of({"$ref": "#"}),
    "unknown keyword": schema_of({"propertyNames": {"pattern": "a"}, "type": "object"}),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_cannot_be_compiled_is_refused_with_the_reason(text: str) -> None:
    with pytest.raises(GrammarError, match=r"cannot be compiled: .") as error:
        COMPILER.compile(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("constant", ["<tool_call>", "a<tool_call>b", "<tool_call", "<tool_call><tool_call>"])
def test_the_text_of_an_added_token_is_spelt_by_others(constant: str) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json())
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    compiler = GrammarCompiler.of_tokenizer(tokenizer.to_str(), BYTES + 1, frozenset({END}))
    grammar, answer = compiler.compile(schema_grammar({"const": constant})), list[int]()
    while (token_id := int(np.flatnonzero(grammar.allowed())[0])) != END:
        assert grammar.forced() in (None, token_id)
        assert grammar.advance(token_id)
        answer.append(token_id)
    assert tokenizer.decode(answer) == json.dumps(constant)
    assert tokenizer.token_to_id("<tool_call>") not in answer
