"""llguidance's matchers and tokenizers, with bounds of their time and memory.

llguidance is loaded with the first grammar.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer


def is_available() -> bool:
    """Whether llguidance is installed."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        return False
    return True


def new_tokenizer(tokenizer_json: str, vocab_size: int, stop_ids: list[int]) -> "LLTokenizer":
    """The tokenizer of a ``tokenizer.json``; all of ``stop_ids`` end a text."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=stop_ids)


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
