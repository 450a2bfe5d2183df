"""Compiled grammars are kept within a number and a size, and count as memory of their sessions."""

import random

import pytest
from llguidance import LLParserLimits

from basestation.sessions.grammars import Grammars
from common import grammar_matcher
from common.grammar import Grammar, GrammarCompiler, regex_grammar
from protocol.errors import GrammarError, LimitError, TransientGrammarError
from protocol.frames import FrameCodec
from protocol.messages import Fault, Message, Mode, Open, Opened, Sampling, Welcome
from tests.fakes import FakeTarget, random_table
from tests.json_tokens import PIECES, STOP, json_tokenizer
from tests.link_pair import Station
from tests.raw_device import hello

MIB = 2**20


class CountingCheck:
    """Says that each grammar takes ``nbytes``, and counts those that are compiled."""

    def __init__(self, nbytes: int) -> None:
        self.compiled = 0
        self._nbytes = nbytes

    def __call__(self, _: str) -> int:
        self.compiled += 1
        return self._nbytes


def open_with(repeats: int, session_id: int = 0) -> Open:
    return Open(session_id, 0, Mode.IDS, Sampling(grammar=regex_grammar(f"a{{{repeats}}}")), (1, 2))


def compiled_twice(nbytes: int, others: int) -> bool:
    """Whether a grammar is compiled again after ``others`` have been."""
    check = CountingCheck(nbytes)
    grammars = Grammars(GrammarCompiler(json_tokenizer, len(PIECES), check), 64 * MIB)
    for index in [*range(others + 1), 0]:
        ready = grammars.ready("device", open_with(index + 1), lambda: None)
        assert ready or grammars.get(open_with(index + 1))
    return check.compiled == others + 2


def test_grammars_are_kept_within_a_number_and_a_size() -> None:
    assert not compiled_twice(nbytes=1 * MIB, others=31)
    assert compiled_twice(nbytes=1 * MIB, others=32)
    assert not compiled_twice(nbytes=30 * MIB, others=1)
    assert compiled_twice(nbytes=30 * MIB, others=2)


def exhaust(grammar: Grammar) -> None:
    """Follow a random answer until the lexer has reached its limit."""
    rng = random.Random(0)  # noqa: S311 - not a secret
    answer: list[int] = []
    while grammar.follow(answer) and grammar.allowed().any() and len(answer) < 200:
        answer.append(PIECES.index(rng.choice("abc")))
    assert "too many states" in grammar.error


def test_a_grammar_that_a_session_has_exhausted_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_matcher, "_limits", lambda: LLParserLimits(max_lexer_states=50))
    check = CountingCheck(MIB)
    grammars = Grammars(GrammarCompiler(json_tokenizer, len(PIECES), check), 64 * MIB)
    request = Open(0, 0, Mode.IDS, Sampling(grammar=regex_grammar("[abc]*a[abc]{9}")), (1, 2))
    for count in (1, 2):
        assert not grammars.ready("device", request, lambda: None)
        assert grammars.ready("device", request, lambda: None)
        assert check.compiled == count
        grammar = grammars.get(request)
        assert grammar is not None
        exhaust(grammar)


@pytest.mark.parametrize("failure", [TransientGrammarError("no process can be started"), MemoryError()], ids=repr)
def test_a_grammar_that_cannot_be_compiled_now_is_refused_once(failure: Exception) -> None:
    failures, refusals = [failure], list[GrammarError]()

    def check(_: str) -> int:
        if failures:
            raise failures.pop()
        return MIB

    def again() -> None:
        with pytest.raises(GrammarError) as caught:
            grammars.ready("device", open_with(1), again)
        refusals.append(caught.value)

    grammars = Grammars(GrammarCompiler(json_tokenizer, len(PIECES), check), 64 * MIB)
    assert not grammars.ready("device", open_with(1), again)
    assert len(refusals) == 1
    assert not grammars.ready("device", open_with(1), lambda: None)
    assert grammars.ready("device", open_with(1), lambda: None)


def test_the_grammars_of_a_devices_sessions_count_as_memory_that_it_holds() -> None:
    compiler = GrammarCompiler(json_tokenizer, len(PIECES), CountingCheck(40 * MIB))
    target = FakeTarget.make(random_table(len(PIECES), seed=1), frozenset({STOP}), grammar_compiler=compiler)
    station, codec = Station(target), FrameCodec(len(PIECES))
    received = []
    messages: list[Message] = [hello(len(PIECES)), *(open_with(index + 1, index) for index in range(3))]
    for message in messages:
        station.push(b"a", codec.encode(message))
        received.append(station.pull(b"a"))
    assert [type(one) for one in received] == [Welcome, Opened, Opened, Fault]
    assert isinstance(received[-1], Fault)
    assert (received[-1].code, "--max-held-bytes" in received[-1].text) == (LimitError.code, True)
