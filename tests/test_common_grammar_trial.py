"""Grammars that take too much are refused, and nothing ends but the process that tried them."""

import gc
import os
import signal
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common.grammar import GrammarCompiler, lark_grammar, schema_grammar
from protocol.errors import GrammarError

VALID = lark_grammar('start: "a" | "b"')
RULES = 3500
HOSTILE = {
    "chain of rules": lark_grammar(
        "start: r0\n" + "".join(f"r{index}: r{index + 1}\n" for index in range(RULES)) + f'r{RULES}: "a"'
    ),
    "chain of references": schema_grammar(
        {
            "$ref": "#/$defs/0",
            "$defs": {str(index): {"items": {"$ref": f"#/$defs/{index + 1}"}} for index in range(1300)}
            | {"1300": {"type": "null"}},
        }
    ),
    "product of patterns": schema_grammar({"allOf": [{"pattern": f"(a|b)*a(a|b){{{index}}}"} for index in range(18)]}),
    "many classes": lark_grammar("start: /" + r"\p{L}*\p{N}?" * 3000 + "/"),
}


@cache
def tokenizer_json() -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate([*alphabet, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return str(tokenizer.to_str())


def new_compiler() -> GrammarCompiler:
    return GrammarCompiler.of_tokenizer(tokenizer_json(), 257, frozenset({256}))


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return new_compiler()


def process_id(compiler: GrammarCompiler) -> int:
    """Of the process that tries grammars."""
    process = compiler._check.__self__._process  # type: ignore[attr-defined]
    assert process
    return int(process.pid)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_grammar_that_takes_too_much_is_refused_and_the_next_one_is_compiled(
    compiler: GrammarCompiler, text: str
) -> None:
    compiler.compile(VALID)
    before = process_id(compiler)
    with pytest.raises(GrammarError, match="cannot be compiled: it takes more than"):
        compiler.compile(text)
    assert compiler.compile(VALID).follow([])
    assert process_id(compiler) == before


def test_what_is_no_grammar_is_refused_with_the_reason(compiler: GrammarCompiler) -> None:
    with pytest.raises(GrammarError, match="EOF while parsing"):
        compiler.compile("{")


def test_another_process_starts_where_the_first_one_ended(compiler: GrammarCompiler) -> None:
    compiler.compile(VALID)
    os.kill(process_id(compiler), signal.SIGKILL)
    with pytest.raises(GrammarError, match="process that compiles grammars ended"):
        compiler.compile(VALID)
    assert compiler.compile(VALID).follow([])


def test_the_process_ends_with_its_compiler() -> None:
    other = new_compiler()
    other.compile(VALID)
    process = Path("/proc", str(process_id(other)))
    assert process.exists()
    del other
    gc.collect()
    assert not process.exists()
