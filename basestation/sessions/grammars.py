"""The compiled grammars of the target's vocabulary.

A grammar is compiled, and moved to the end of an answer that goes on, in another
thread, at most one of each device at a time. The request that needs it is taken again
afterwards, so that no forward pass waits.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from basestation.sessions.held_bytes import held_bytes
from common.grammar import Grammar, GrammarCompiler
from protocol.errors import FullError, GrammarError, TransientGrammarError
from protocol.messages import Extend, Open, Request

RunElsewhere: TypeAlias = Callable[[Callable[[], None], Callable[[], None]], None]
"""Runs the first call in another thread, then the second one in the engine's."""

logger = logging.getLogger(__name__)

_MAX_KEPT = 32
_MAX_KEPT_BYTES = 64 * 2**20
_MAX_COMPILING = 64
_MAX_WAITING = 16
_RETRY_SECONDS = 1


def run_here(work: Callable[[], None], then: Callable[[], None]) -> None:
    """Run both now."""
    work()
    then()


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The ``text`` of a grammar, and the ``answer`` whose end it is wanted at."""

    text: str
    answer: tuple[int, ...] = ()

    @classmethod
    def by(cls, request: Request) -> "_Wanted":
        """What a request's sampling settings want; the text is "" without a grammar."""
        if isinstance(request, Open):
            return cls(request.sampling.grammar, request.prompt_ids[len(request.prompt_ids) - request.answer_len :])
        return cls(request.sampling.grammar if isinstance(request, Extend) and request.sampling else "")


@dataclass
class _Job:
    """What one device waits for.

    Attributes:
        waiting: by session, the bytes of a request and what takes it again.
        outcomes: once they are known.
    """

    wanted: _Wanted
    waiting: dict[int, tuple[int, Callable[[], None]]]
    outcomes: dict[_Wanted, Grammar | GrammarError] = field(default_factory=dict)


class Grammars:
    """Grammars by their text, the last few kept within a number and a size.

    Args:
        compiler: for the target's vocabulary; None where grammars are not available.
        max_bytes: of the requests of an owner that wait.
        run_elsewhere: runs the compiler.
    """

    def __init__(
        self, compiler: GrammarCompiler | None, max_bytes: int, run_elsewhere: RunElsewhere = run_here
    ) -> None:
        self._compiler = compiler
        self._max_bytes = max_bytes
        self._run_elsewhere = run_elsewhere
        self._kept: OrderedDict[_Wanted, Grammar | GrammarError] = OrderedDict()
        self._jobs: dict[str, _Job] = {}

    def ready(self, owner: str, request: Request, again: Callable[[], None]) -> bool:
        """Whether the grammar of a request is compiled; if not, ``again`` takes the request again once it is.

        Raises:
            GrammarError: it cannot be compiled; a TransientGrammarError if it may be later.
            FullError: another grammar of the owner is being compiled, or those of too many, or too much waits for it.
        """
        wanted = _Wanted.by(request)
        compiled = self._outcome(_Wanted(wanted.text))
        if not wanted.text or self._outcome(wanted):
            return True
        compiler = self._compiler
        if compiler is None:
            raise GrammarError("this base station has no grammars: it needs llguidance and a fast tokenizer")
        job, entry = self._jobs.get(owner), (held_bytes(request), again)
        if job is None and len(self._jobs) < _MAX_COMPILING:
            job = self._jobs[owner] = _Job(wanted, {request.session_id: entry})
            self._run_elsewhere(lambda: _compile(compiler, job, compiled), lambda: self._conclude(owner))
        elif job is not None and job.wanted == wanted and self._fits(job, request.session_id, entry[0]):
            job.waiting[request.session_id] = entry
        else:
            raise FullError(f"grammars are being compiled; retry in {_RETRY_SECONDS} s", _RETRY_SECONDS)
        return False

    def get(self, request: Request) -> Grammar | None:
        """The grammar of a request that is ready; None where it has none."""
        grammar = self._outcome(_Wanted.by(request))
        return grammar.copy() if grammar else None

    def forget(self, owner: str, session_id: int) -> None:
        """Do not take the request again that waits for a grammar of a session."""
        if owner in self._jobs:
            self._jobs[owner].waiting.pop(session_id, None)

    @property
    def _kept_bytes(self) -> int:
        return sum(one.nbytes for one in self._kept.values() if isinstance(one, Grammar))

    def _outcome(self, wanted: _Wanted) -> Grammar | None:
        outcome = self._kept.get(wanted)
        if isinstance(outcome, GrammarError):
            raise type(outcome)(str(outcome))
        return None if outcome is None or outcome.exhausted else outcome

    def _fits(self, job: _Job, session_id: int, size: int) -> bool:
        others = [held for other, (held, _) in job.waiting.items() if other != session_id]
        return len(others) < _MAX_WAITING and sum(others) + size <= self._max_bytes

    def _conclude(self, owner: str) -> None:
        job = self._jobs.pop(owner)
        self._kept.update(job.outcomes)
        for _, again in job.waiting.values():
            again()
        for wanted, outcome in job.outcomes.items():
            if wanted.answer or isinstance(outcome, TransientGrammarError):
                self._kept.pop(wanted, None)
        while len(self._kept) > _MAX_KEPT or self._kept_bytes > _MAX_KEPT_BYTES:
            self._kept.popitem(last=False)


def _compile(compiler: GrammarCompiler, job: _Job, compiled: Grammar | None) -> None:
    """Fill in the outcomes of a job, for its text if that is not ``compiled`` yet, and for its answer."""
    text, answer = job.wanted.text, job.wanted.answer
    unknown = "the grammar cannot be compiled; the base station's log says why"
    job.outcomes[job.wanted] = TransientGrammarError(unknown)
    try:
        grammar = compiled or compiler.compile(text)
        job.outcomes[_Wanted(text)] = grammar
        if answer:
            followed = grammar.copy()
            followed.follow(answer)
            job.outcomes[job.wanted] = _checked(followed)
    except GrammarError as error:
        job.outcomes[_Wanted(text)] = job.outcomes[job.wanted] = error
    except Exception:
        logger.exception("a grammar of %d characters cannot be compiled", len(text))


def _checked(grammar: Grammar) -> Grammar | GrammarError:
    return GrammarError(f"the grammar cannot be applied: {grammar.error}") if grammar.error else grammar
