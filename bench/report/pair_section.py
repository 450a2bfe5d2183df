"""The section of docs/results.md on a pair of a small and a large model; what was not measured is left out."""

from collections.abc import Iterator
from pathlib import Path

from bench.grid.cells import Cell
from bench.pair.category_summary import summary_rows
from bench.report.grid_section import grid_parts
from bench.report.markdown import table
from bench.setup.results import Results, number

PAIR_COMMANDS = {
    "categories": (
        "edgedraft-bench categories --bundle build/pair/bundle --target build/pair/target --prompts FILE "
        "--per-category 2 --repeats 1 --max-new-tokens 64 --temperature 0"
    ),
    "pair_grid": (
        "edgedraft-bench grid --bundle build/pair/bundle --target build/pair/target --round-trip-ms 0 "
        "--round-trip-ms 50 --round-trip-ms 100 --round-trip-ms 200 --uplink-mbit 1 --uplink-mbit 50"
    ),
    "peers": (
        "edgedraft-bench peers --bundle build/pair/bundle --target build/pair/target --draft build/pair/draft "
        "--small-draft build/sample --target-gguf FILE --draft-gguf FILE --prompts FILE --repeats 3"
    ),
    "lookup": "edgedraft-bench lookup --bundle build/pair/bundle --target build/pair/target --max-new-tokens 128",
    "lookup_without_amx": (
        "edgedraft-bench lookup --bundle build/pair/bundle --target build/pair/target --max-new-tokens 128"
    ),
    "lookup_categories": (
        "edgedraft-bench lookup --bundle build/pair/bundle --target build/pair/target --prompts FILE "
        "--category summarization --category rag --per-category 3 --max-new-tokens 64"
    ),
    "lookup_others": (
        "edgedraft-bench lookup --bundle build/pair/bundle --target build/pair/target --prompts FILE "
        "--category coding --category math --category writing --category qa --category roleplay --category reasoning "
        "--category extraction --category stem --category humanities --category translation "
        "--category math_reasoning --per-category 1 --max-new-tokens 48"
    ),
    "lookup_math": (
        "edgedraft-bench lookup --bundle build/pair/bundle --target build/pair/target --prompts FILE "
        "--category math_reasoning --per-category 27 --repeats 1 --max-new-tokens 64"
    ),
    "verification": (
        "edgedraft-bench verification --bundle build/pair/bundle --target build/pair/target --prompts FILE "
        "--per-category 1 --repeats 2 --max-new-tokens 64"
    ),
    "bridge": (
        "edgedraft-bench categories --bundle build/pair/bridge --target build/pair/target --prompts FILE "
        "--per-category 2 --repeats 1 --max-new-tokens 64 --temperature 0"
    ),
    "bridge_small": (
        "edgedraft-bench categories --bundle build/pair/bridge --target build/pair/draft --prompts FILE "
        "--per-category 2 --repeats 1 --max-new-tokens 64 --temperature 0"
    ),
    "agreement": "edgedraft-bench agreement --bundle build/pair/bridge --target build/pair/target --prompts FILE",
    "weights": "edgedraft-bench weights --target build/pair/target --prompts FILE",
}
PAIR_CELLS = [
    Cell(temperature, round_trip, uplink)
    for temperature in (0.0, 1.0)
    for round_trip in (0.0, 50.0, 100.0, 200.0)
    for uplink in (1.0, 50.0)
]
_CATEGORY_COLUMNS = (
    "temperature",
    "answers",
    "tokens",
    "speedup_with_prompt_interval",
    "over_colocated_interval",
    "load_average",
    "failed",
)


def category_parts(results: Results) -> Iterator[str]:
    """A table per temperature, and the medians over the categories."""
    yield (
        "Speedup: tokens per second over those of the target alone, after the first tokens; `with prompt` counts the "
        "prompt. Medians of paired answers, with a bootstrap 95 % interval. `colocated` runs the draft model on the "
        "base station's core. `acceptance length` is the mean number of accepted tokens plus 1, `tokens per round` "
        "counts also the tokens that the target decoded alone. `predicted speedup` is the round model's for the "
        "measured acceptance, drafting time and verification line."
    )
    for temperature in sorted({number(row, "temperature") for row in results.rows}):
        rows = [row for row in results.rows if row["temperature"] == temperature]
        yield f"### Categories at temperature {temperature:g}\n\n{table(rows, leave_out=_CATEGORY_COLUMNS)}"
    yield f"### Over all categories\n\n{table(summary_rows(results.rows))}"
    failed = [f"{row['category']}, {row['case']}: {row['failed']}" for row in results.rows if row["failed"]]
    if failed:
        yield f"Failed: {'; '.join(failed)}."


def peer_parts(results: Results) -> Iterator[str]:
    """What is compared, and the table."""
    yield (
        "Tokens per second with the prompt included, at temperature 0; all programs use all cores, and each keeps the "
        "target in its own format. `over its target alone` and `edgedraft over it` are medians of paired answers with "
        "a bootstrap 95 % interval, `same answers` counts those equal to the program's own target alone.\n\n"
        + table(results.rows)
    )


def lookup_parts(results: Results) -> Iterator[str]:
    """What is compared, and the table."""
    yield (
        "Medians of paired answers, with a bootstrap 95 % interval: tokens per second over those of the target alone, "
        "and over those of the draft model without lookup.\n\n" + table(results.rows)
    )


def verification_parts(results: Results) -> Iterator[str]:
    """What is compared, and the table."""
    yield (
        "Block verification over token-wise verification in mode `topk`, with a bootstrap 95 % interval. The "
        "acceptance length is the mean of all rounds.\n\n" + table(results.rows)
    )


def agreement_parts(results: Results) -> Iterator[str]:
    """What is counted, and the table."""
    yield (
        "The share of the target's tokens that the draft model, which sees all tokens before them, proposes itself: "
        "greedily at temperature 0, in mode `coupled` above.\n\n" + table(results.rows)
    )


def weights_parts(results: Results) -> Iterator[str]:
    """What is compared, and the table."""
    yield (
        "Int8 weights by which layers' rows are rotated. `argmax` and `overlap`, Σ min(p, q) at temperature 1, compare "
        "with the original on its own answers; `over packed` is the speedup over packed bfloat16 weights, the median "
        "of passes that take turns, with a bootstrap 95 % interval.\n\n" + table(results.rows)
    )


def pair_grid_parts(results: Results, plots: Path) -> Iterator[str]:
    """As for the sample model, with links of up to 200 ms."""
    yield from grid_parts(results, plots, PAIR_CELLS, "pair_")
