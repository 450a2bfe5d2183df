"""The compiled grammars of the target's vocabulary.

A grammar is compiled in another thread, at most one of each device at a time. The
request that needs it is taken again afterwards, so that no forward pass waits.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

from common.grammar import Grammar, GrammarCompiler
from protocol.errors import FullError, GrammarError
from protocol.messages import Extend, Open, Request

RunElsewhere: TypeAlias = Callable[[Callable[[], None], Callable[[], None]], None]
"""Runs the first call in another thread, then the second one in the engine's."""

_MAX_KEPT = 64
_MAX_COMPILING = 64
_RETRY_SECONDS = 1


def run_here(work: Callable[[], None], then: Callable[[], None]) -> None:
    """Run both now."""
    work()
    then()


def grammar_of(request: Request) -> str:
    """The grammar of a request's sampling settings; "" where it has none."""
    sampling = request.sampling if isinstance(request, Open | Extend) else None
    return sampling.grammar if sampling else ""


class Grammars:
    """Grammars by their text, the last few kept.

    Args:
        compiler: for the target's vocabulary; None where grammars are not available.
        run_elsewhere: runs the compiler.
    """

    def __init__(self, compiler: GrammarCompiler | None, run_elsewhere: RunElsewhere = run_here) -> None:
        self._compiler = compiler
        self._run_elsewhere = run_elsewhere
        self._kept: OrderedDict[str, Grammar | GrammarError] = OrderedDict()
        self._compiling: dict[str, tuple[str, Callable[[], None]]] = {}

    def ready(self, owner: str, text: str, again: Callable[[], None]) -> bool:
        """Whether a grammar is compiled; if not, ``again`` is called once it is.

        Args:
            owner: of the request.
            text: the grammar; "" for none.
            again: takes the request again.

        Raises:
            GrammarError: it cannot be compiled.
            FullError: another grammar of the owner is being compiled, or those of too many.
        """
        if not text or text in self._kept:
            outcome = self._kept.get(text)
            if isinstance(outcome, GrammarError):
                raise GrammarError(str(outcome))
            return True
        compiler = self._compiler
        if compiler is None:
            raise GrammarError("this base station has no grammars: it needs llguidance and a fast tokenizer")
        if owner in self._compiling and self._compiling[owner][0] == text:
            self._compiling[owner] = (text, again)  # a repetition
            return False
        if owner in self._compiling or len(self._compiling) >= _MAX_COMPILING:
            raise FullError(f"grammars are being compiled; retry in {_RETRY_SECONDS} s", _RETRY_SECONDS)
        self._compiling[owner] = (text, again)
        self._run_elsewhere(lambda: self._compile(compiler, text), lambda: self._conclude(owner, text))
        return False

    def get(self, text: str) -> Grammar | None:
        """A compiled grammar, before its first token; None for ""."""
        grammar = self._kept.get(text)
        return grammar.copy() if isinstance(grammar, Grammar) else None

    def forget(self, owner: str) -> None:
        """Do not take the request again that waits for a grammar of an owner."""
        if owner in self._compiling:
            self._compiling[owner] = (self._compiling[owner][0], _do_nothing)

    def _compile(self, compiler: GrammarCompiler, text: str) -> None:
        try:
            outcome: Grammar | GrammarError = compiler.compile(text)
        except GrammarError as error:
            outcome = error
        self._kept[text] = outcome

    def _conclude(self, owner: str, text: str) -> None:
        _, again = self._compiling.pop(owner)
        self._kept.move_to_end(text)
        while len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        again()


def _do_nothing() -> None:
    pass
