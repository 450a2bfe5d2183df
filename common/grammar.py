"""Grammars that restrict the tokens of an answer, by llguidance; the same on both ends.

A grammar is a text in llguidance's format, made from a JSON schema, a Lark grammar or
a regular expression. What it allows next is a function of the answer's tokens alone.
At its end only stop ids are allowed.

llguidance is loaded with the first grammar.
"""

import json
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from protocol.errors import GrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

Mask: TypeAlias = npt.NDArray[np.bool_]

JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON with one space after each comma and colon: most of these tokens are forced, and no answer is white space."""


def is_available() -> bool:
    """Whether llguidance is installed."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        return False
    return True


def schema_grammar(schema: Any) -> str:
    """The grammar of the JSON texts that are valid under a JSON schema."""
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": JSON_OPTIONS}}]}, separators=(",", ":"))


def lark_grammar(lark: str) -> str:
    """The grammar written in llguidance's variant of Lark."""
    return json.dumps({"grammars": [{"lark_grammar": lark}]}, separators=(",", ":"))


def regex_grammar(regex: str) -> str:
    """The grammar of the texts that match a regular expression as a whole."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(regex)


class Grammar:
    """What a grammar allows after some tokens of an answer; advances and rolls back with them.

    Attributes:
        error: why nothing can be said any more: a limit was exceeded; "" otherwise.
    """

    def __init__(self, matcher: "LLMatcher", vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._stop_ids = stop_ids
        self._tokens: list[int] = []
        self.error = ""

    def copy(self) -> "Grammar":
        """Another grammar, before its first token."""
        matcher = self._matcher.deep_copy()
        matcher.reset()
        return Grammar(matcher, self._vocab_size, self._stop_ids)

    def follow(self, tokens: Sequence[int]) -> bool:
        """Move to the state after the answer ``tokens``; whether the grammar allows all of them.

        The state does not change with a stop id at their end, which nothing may follow.
        """
        ends = bool(tokens) and tokens[-1] in self._stop_ids
        body = tokens[:-1] if ends else tokens
        shared = 0
        while shared < min(len(body), len(self._tokens)) and body[shared] == self._tokens[shared]:
            shared += 1
        if shared < len(self._tokens):
            self._matcher.rollback(len(self._tokens) - shared)
            del self._tokens[shared:]
        rest = list(takewhile(lambda token_id: token_id not in self._stop_ids, body[shared:]))
        consumed = self._matcher.try_consume_tokens(rest) if rest else 0
        self._tokens += rest[:consumed]
        self._note_error()
        allowed = len(self._tokens) == len(body) and not self.error
        return allowed and (not ends or bool(self.allowed()[tokens[-1]]))

    def allowed(self) -> Mask:
        """Which tokens may come next, bool [V]."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._note_error()
        return np.unpackbits(packed, bitorder="little", count=self._vocab_size).view(np.bool_)

    def forced(self) -> int | None:
        """The token that comes next if the grammar determines the text, as the tokenizer would write it."""
        tokens = self._matcher.compute_ff_tokens()
        self._note_error()
        return tokens[0] if tokens else None

    def _note_error(self) -> None:
        if self._matcher.is_error():
            self.error = _first_line(self._matcher.get_error())


class GrammarCompiler:
    """Compiles grammars for one vocabulary; compiling may take up to a second, without Python's lock.

    Args:
        tokenizer: makes llguidance's tokenizer, once.
        vocab_size: length of the masks.
    """

    def __init__(self, tokenizer: "Callable[[], LLTokenizer]", vocab_size: int) -> None:
        self._make_tokenizer = tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._vocab_size = vocab_size

    @classmethod
    def of_tokenizer(cls, tokenizer_json: str, vocab_size: int, stop_ids: frozenset[int]) -> "GrammarCompiler":
        """Compiles for the tokenizer of a ``tokenizer.json``; all of ``stop_ids`` end a text."""

        def make() -> "LLTokenizer":
            from llguidance import LLTokenizer

            return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(stop_ids))

        return cls(make, vocab_size)

    def compile(self, text: str) -> Grammar:
        """Compile a grammar.

        Raises:
            GrammarError: it is not a grammar, exceeds a limit, allows no text, or llguidance is not installed.
        """
        if not is_available():
            raise GrammarError("grammars need llguidance, which is not installed here")
        from llguidance import LLMatcher

        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=_limits())
        grammar = Grammar(matcher, self._vocab_size, frozenset(self._tokenizer.eos_tokens))
        if not matcher.is_error():
            grammar.allowed()
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be compiled: {_first_line(matcher.get_error())}")
        return grammar


def _limits() -> "LLParserLimits":
    """Bounds of the time and memory of llguidance: below a second to compile, a few milliseconds for a token."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_grammar_size=200_000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=50_000,
    )


def _first_line(error: str) -> str:
    return error.strip().splitlines()[0][:200] if error.strip() else "unknown error"
