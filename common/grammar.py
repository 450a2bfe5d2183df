"""Grammars that restrict the tokens of an answer, by llguidance; the same on both ends.

A grammar is a text in llguidance's format, made from a JSON schema, a Lark grammar or
a regular expression. What it allows next is a function of the answer's tokens alone.
At its end only stop ids are allowed.
"""

import json
import math
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from common.common_prefix import common_prefix
from common.grammar_matcher import is_available, new_matcher, new_tokenizer
from common.grammar_trial import GrammarTrial
from protocol.errors import GrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Mask: TypeAlias = npt.NDArray[np.bool_]

_FOLLOW_SECONDS = 1.0
_RECENT = 256
"""Tokens at the end of an answer that may differ from those followed before: a Draft. Others are compared at once."""
_LEXER_ERROR = "lexer error"
"""How llguidance's message begins where a lexer has reached a limit, after which it cannot be used any more."""

JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON with one space after each comma and colon: most of these tokens are forced, and no answer is white space."""


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


@dataclass
class _Lexer:
    """The lexer that all copies of a grammar share; its states are made when they are first needed, up to a limit."""

    exhausted: bool = False


class Grammar:
    """What a grammar allows after some tokens of an answer; advances and rolls back with them.

    Attributes:
        nbytes: of memory that it and each copy take, at most; 0 where that was not measured.
        error: why nothing can be said any more: a limit was exceeded; "" otherwise.
    """

    def __init__(
        self,
        matcher: "LLMatcher",
        tokenizer: "LLTokenizer",
        vocab_size: int,
        stop_ids: frozenset[int],
        nbytes: int = 0,
        lexer: _Lexer | None = None,
    ) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = stop_ids
        self._lexer = lexer or _Lexer()
        self.nbytes = nbytes
        self._tokens = array("I")
        self._seconds = self._deadline = math.inf
        self.error = ""

    @property
    def exhausted(self) -> bool:
        """Whether neither it nor any copy can be used any more, so that it must be compiled again."""
        return self._lexer.exhausted

    def copy(self) -> "Grammar":
        """Another grammar in the same state."""
        matcher, lexer = self._matcher.deep_copy(), self._lexer
        copied = Grammar(matcher, self._tokenizer, self._vocab_size, self._stop_ids, self.nbytes, lexer)
        copied._tokens, copied.error = self._tokens[:], self.error
        return copied

    def follow(self, tokens: Sequence[int], seconds: float = _FOLLOW_SECONDS) -> bool:
        """Move to the state after the answer ``tokens``; whether the grammar allows all of them.

        Args:
            tokens: of the answer; the state does not change with a stop id at their end, which nothing may follow.
            seconds: of CPU time up to the next ``follow``; more of it is an ``error``.
        """
        self._seconds, self._deadline = seconds, time.thread_time() + seconds
        tokens = array("I", tokens)
        known = max(0, min(len(tokens), len(self._tokens)) - _RECENT)
        known = known if tokens[:known] == self._tokens[:known] else 0
        shared = known + common_prefix(tokens[known:], self._tokens[known:])
        if shared < len(self._tokens):
            self._matcher.rollback(len(self._tokens) - shared)
            del self._tokens[shared:]
        return (
            not self.error
            and all(map(self.advance, tokens[shared:-1]))
            and (shared == len(tokens) or self._end_with(tokens[-1]))
        )

    def advance(self, token_id: int) -> bool:
        """Move by one token, not a stop id; whether the grammar allows it."""
        if self.error or token_id in self._stop_ids or not self._matcher.try_consume_tokens([token_id]):
            self._note_error()
            return False
        self._tokens.append(token_id)
        self._note_error()
        return not self.error

    def allowed(self) -> Mask:
        """Which tokens may come next, bool [V]."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._note_error()
        mask = np.unpackbits(words.view(np.uint8), bitorder="little", count=self._vocab_size).view(np.bool_)
        if np.count_nonzero(words) == 1 and np.count_nonzero(mask) == 1:
            only = int(mask.argmax())
            mask[only] = False
            mask[self._spelled(only)] = True
        return mask

    def forced(self) -> int | None:
        """The token that comes next if the grammar determines the text, as the tokenizer would write it."""
        tokens = self._matcher.compute_ff_tokens()
        self._note_error()
        return self._spelled(tokens[0]) if tokens else None

    def _spelled(self, forced: int) -> int:
        """A token that the grammar forces, or the first of those that spell its text where it is not allowed itself.

        llguidance names an added token, such as a mark of a chat template, where its text is forced, and then refuses
        it: the text in a grammar is never such a token.
        """
        if forced in self._stop_ids or self._matcher.validate_tokens([forced]):
            return forced
        return self._tokenizer.greedy_tokenize(self._tokenizer.decode_str([forced]))[0]

    def _end_with(self, token_id: int) -> bool:
        return bool(self.allowed()[token_id]) if token_id in self._stop_ids else self.advance(token_id)

    def _note_error(self) -> None:
        if self._matcher.is_error():
            self.error = _first_line(self._matcher.get_error())
            self._lexer.exhausted |= self.error.startswith(_LEXER_ERROR)
        elif time.thread_time() > self._deadline:
            self.error = f"it takes more than {self._seconds:.2g} s"


class GrammarCompiler:
    """Compiles grammars for one vocabulary; compiling may take some seconds, without Python's lock.

    Args:
        tokenizer: makes llguidance's tokenizer, once.
        vocab_size: length of the masks.
        check: compiles a grammar first where it can end nothing else, and returns its bytes; raises GrammarError.
    """

    def __init__(
        self, tokenizer: "Callable[[], LLTokenizer]", vocab_size: int, check: Callable[[str], int] = lambda _: 0
    ) -> None:
        self._make_tokenizer = tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._vocab_size = vocab_size
        self._check = check

    @classmethod
    def of_tokenizer(cls, tokenizer_json: str, vocab_size: int, stop_ids: frozenset[int]) -> "GrammarCompiler":
        """Compiles for the tokenizer of a ``tokenizer.json``; all of ``stop_ids`` end a text."""
        setup = tokenizer_json, vocab_size, sorted(stop_ids)
        return cls(lambda: new_tokenizer(*setup), vocab_size, GrammarTrial(*setup).check)

    def compile(self, text: str) -> Grammar:
        """Compile a grammar.

        Raises:
            GrammarError: it is not a grammar, exceeds a limit or allows no text, or llguidance is not installed or
                cannot use the tokenizer.
        """
        if not is_available():
            raise GrammarError("grammars need llguidance, which is not installed here")
        if self._tokenizer is None:
            try:
                self._tokenizer = self._make_tokenizer()
            except ValueError as error:
                raise GrammarError(f"llguidance cannot use this model's tokenizer: {error}") from error
        nbytes = self._check(text)
        matcher = new_matcher(self._tokenizer, text)
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be compiled: {_first_line(matcher.get_error())}")
        return Grammar(matcher, self._tokenizer, self._vocab_size, frozenset(self._tokenizer.eos_tokens), nbytes)


def _first_line(error: str) -> str:
    return error.strip().splitlines()[0][:200] if error.strip() else "unknown error"
