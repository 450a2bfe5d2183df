"""Grammars that take too much are refused, and nothing ends but the process that tried them."""

import gc
import os
import signal
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import grammar_trial
from common.grammar import GrammarCompiler, lark_grammar, schema_grammar
from protocol.errors import GrammarError, TransientGrammarError
from tests.hostile_grammars import HOSTILE, VALID, ids_of, new_compiler, tokenizer_json

ENDLESS = """
import itertools
from common import grammar_trial

grammar_trial.new_matcher = lambda *_: all(itertools.repeat(True))
print(grammar_trial._exit_code(None, ""))
"""


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


def test_a_grammar_and_its_copies_know_their_size(compiler: GrammarCompiler) -> None:
    small = compiler.compile(VALID)
    large = compiler.compile(schema_grammar({"enum": [f"{index:x}" * 8 for index in range(4000)]}))
    assert 0 < small.nbytes < large.nbytes == large.copy().nbytes


def test_a_tokenizer_may_have_more_tokens_than_the_model() -> None:
    smaller = GrammarCompiler.of_tokenizer(tokenizer_json(), 100, frozenset({99}))
    allowed = smaller.compile(lark_grammar("start: /[A-Z]/")).allowed()
    assert np.flatnonzero(allowed).tolist() == ids_of(string.ascii_uppercase)
    assert len(allowed) == 100


def test_what_is_no_grammar_is_refused_with_the_reason(compiler: GrammarCompiler) -> None:
    with pytest.raises(GrammarError, match="EOF while parsing"):
        compiler.compile("{")


def test_another_process_starts_where_the_first_one_ended(compiler: GrammarCompiler) -> None:
    compiler.compile(VALID)
    os.kill(process_id(compiler), signal.SIGKILL)
    with pytest.raises(TransientGrammarError, match="process that compiles grammars ended"):
        compiler.compile(VALID)
    assert compiler.compile(VALID).follow([])


@pytest.mark.parametrize(
    ("exit_code", "transient"),
    [
        (-signal.SIGXCPU, False),  # the limit of CPU time
        (-signal.SIGABRT, False),  # a failed allocation
        (-signal.SIGSEGV, False),  # the limit of the stack
        (0, False),
        (-signal.SIGALRM, True),  # other processes have the CPU
        (-signal.SIGKILL, True),  # the system is out of memory
    ],
)
def test_a_grammar_is_not_blamed_for_a_busy_machine(exit_code: int, transient: bool) -> None:
    assert isinstance(grammar_trial._failure(exit_code), TransientGrammarError) == transient


def test_the_limit_of_cpu_time_is_no_signal_that_the_system_sends_too() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDLESS], capture_output=True, text=True, check=True)
    assert int(ended.stdout) in (-signal.SIGXCPU, -signal.SIGALRM)


@pytest.mark.parametrize("executable", ["/nonexistent", "/bin/false"])
def test_a_process_that_does_not_start_is_a_grammar_error(executable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    compiler = new_compiler()
    for _ in range(2):
        with pytest.raises(TransientGrammarError, match=r"no process can be started|grammars ended"):
            compiler.compile(VALID)


def test_the_process_ends_with_its_compiler() -> None:
    other = new_compiler()
    other.compile(VALID)
    process = Path("/proc", str(process_id(other)))
    assert process.exists()
    del other
    gc.collect()
    assert not process.exists()
