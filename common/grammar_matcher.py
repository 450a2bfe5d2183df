"""llguidance's matchers and tokenizers, with bounds of their time and memory.

llguidance is loaded with the first grammar.
"""

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_CHARACTER = r'[^"\\\x00-\x1F\x7F]'
"""Of a JSON string, without escapes."""
SLICES = (
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_CHARACTER}{{1,{most}}}" for most in (2, 3, 4, 5, 6, 8, 10, 30)),
    f"{_CHARACTER}+",
)
"""Tokens that are allowed without a look at each, where the grammar allows all texts of their form.

llguidance's own have up to 10 or 30 characters; near the end of a bounded string it would look at nearly every token.
"""


def is_available() -> bool:
    """Whether llguidance is installed."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        return False
    return True


def new_tokenizer(tokenizer_json: str, vocab_size: int, stop_ids: list[int]) -> "LLTokenizer":
    """The tokenizer of a ``tokenizer.json``; all of ``stop_ids`` end a text.

    Its masks have a bit for each token, which may be more than ``vocab_size``: some files name a model's padding too.
    """
    from llguidance import LLTokenizer

    size = max(vocab_size, _token_count(tokenizer_json))
    return LLTokenizer(tokenizer_json, n_vocab=size, eos_token=stop_ids, slices=list(SLICES))


def _token_count(tokenizer_json: str) -> int:
    """Tokens of a ``tokenizer.json``: a model's, by text or in a list, and those that are added; 0 of another file."""
    content = json.loads(tokenizer_json)
    vocabulary = content.get("model", {}).get("vocab", ())
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    last: int = max([*ids, *(token["id"] for token in content.get("added_tokens", ()))], default=-1)
    return last + 1


def new_matcher(tokenizer: "LLTokenizer", text: str) -> "LLMatcher":
    """Compile a grammar, without Python's lock, and compute its first mask; the matcher has the error, if any."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, text, log_level=0, limits=_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


def _limits() -> "LLParserLimits":
    """An ambiguous grammar fails after some tokens, with at most a few milliseconds for each; others take microseconds.

    These limits do not bound the time, the memory and the recursion of compiling; see ``grammar_trial.py``.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_grammar_size=200_000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        max_items_in_row=300,
        step_max_items=10_000,
        max_lexer_states=20_000,
    )
