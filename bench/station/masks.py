"""What a grammar costs: compiling it, its memory, and the mask of each row of logits."""

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from tokenizers import Tokenizer

from bench.setup.options import JsonOption, console
from bench.setup.results import Results, Row
from common.grammar import Grammar, GrammarCompiler, lark_grammar, regex_grammar, schema_grammar
from protocol.errors import SettingsError

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "born": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
        "height": {"type": "integer", "minimum": 40, "maximum": 250},
        "languages": {"type": "array", "items": {"enum": ["de", "en", "fr", "ja", "sw"]}, "maxItems": 4},
        "address": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"city": {"type": "string"}}}]},
    },
    "required": ["name", "born", "height", "languages", "address"],
    "additionalProperties": False,
}
GRAMMARS: Mapping[str, str] = {
    "any JSON object": schema_grammar({"type": "object"}),
    "an object of five properties": schema_grammar(_PERSON),
    "up to 8 such objects": schema_grammar({"type": "array", "items": _PERSON, "maxItems": 8}),
    "a regular expression": regex_grammar(r"(\w{1,12}, ){0,9}\w{1,12}\.(\n[A-Z][a-z ]{0,60}\.){0,4}"),
    "sums in Lark": lark_grammar('start: term (("+" | "-") term)*\nterm: /[0-9]{1,6}/ | "(" start ")"'),
}
"""What the rows are about."""


def masks(
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json, for instance that of a bundle.")],
    vocab_size: Annotated[
        int | None, typer.Option(help="Length of a mask. Default: the tokenizer's tokens.", min=1)
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of each grammar.", min=1)] = 2000,
    longest: Annotated[int, typer.Option(help="Tokens of the longest answer.", min=1)] = 64,
    json_file: JsonOption = None,
) -> None:
    """Measure the time and memory of grammars: to compile them, and for the mask of each row."""
    text, stop_id = _read_tokenizer(tokenizer)
    size = vocab_size or stop_id + 1
    measured = Results({"vocab_size": size, "rows": rows}, measure_masks(text, size, stop_id, rows, longest))
    measured.show(console)
    measured.write(json_file)


def _read_tokenizer(path: Path) -> tuple[str, int]:
    """The text of a ``tokenizer.json``, and the id of its last token.

    Raises:
        SettingsError: the file cannot be read, or is another one.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return text, Tokenizer.from_str(text).get_vocab_size() - 1
    except Exception as error:  # the library raises Exception itself
        raise SettingsError("tokenizer", str(path), f"a tokenizer.json ({error})") from error


def measure_masks(tokenizer_json: str, vocab_size: int, stop_id: int, rows: int, longest: int) -> list[Row]:
    """A row for each grammar.

    The answers are random tokens that it allows. A mask's time is CPU time, and includes moving to its state by a
    token. The same answers follow again, for which the lexer has all its states.

    Args:
        tokenizer_json: the text of a ``tokenizer.json``.
        vocab_size: length of a mask.
        stop_id: ends a text.
        rows: masks of each grammar.
        longest: tokens after which an answer ends.
    """
    compiler = GrammarCompiler.of_tokenizer(tokenizer_json, vocab_size, frozenset({stop_id}))
    compiler.compile(lark_grammar('start: "a"'))  # starts the process that tries grammars
    measured: list[Row] = []
    for case, text in GRAMMARS.items():
        began = time.perf_counter()
        grammar = compiler.compile(text)
        compile_seconds = time.perf_counter() - began
        micros, again = (1e6 * _mask_seconds(grammar, stop_id, rows, longest) for _ in range(2))
        figures = {f"mask_p{share}_microseconds": float(np.percentile(micros, share)) for share in (50, 99)}
        measured.append(
            {
                "case": case,
                "compile_milliseconds": 1e3 * compile_seconds,
                "mebibytes_at_most": grammar.nbytes / 2**20,
                **figures,
                "mask_longest_microseconds": float(micros.max()),
                "again_p99_microseconds": float(np.percentile(again, 99)),
            }
        )
    return measured


def _mask_seconds(compiled: Grammar, stop_id: int, rows: int, longest: int) -> npt.NDArray[np.float64]:
    rng = random.Random(0)  # noqa: S311 - not a secret
    seconds = np.empty(rows)
    grammar, length, token_id = compiled.copy(), 0, stop_id
    for row in range(rows):
        if token_id == stop_id or length == longest:
            grammar, length, token_id = compiled.copy(), 0, stop_id
        began = time.thread_time()
        if token_id != stop_id:
            grammar.advance(token_id)
        allowed = grammar.allowed()
        seconds[row] = time.thread_time() - began
        token_id = int(rng.choice(np.flatnonzero(allowed)))
        length += 1
    return seconds
