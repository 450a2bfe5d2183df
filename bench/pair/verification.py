"""Block verification against token-wise verification, by category of prompt: acceptance length and time."""

from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from scipy import stats

from bench.grid.cells import AnswerLimits, Case, Cell, Workload
from bench.grid.pair_run import Measured, PairRun
from bench.grid.ratio import Ratio
from bench.grid.throughput import Throughput
from bench.setup.options import (
    BundleOption,
    DraftLenOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    TargetOption,
    console,
    progress_bar,
)
from bench.setup.prompts import OWN_PROMPTS, prompts_by_category
from bench.setup.results import Results, Row
from protocol.messages import Mode

TOKEN, BLOCK = "token", "block"
ALL = "all"


def verification(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    prompts: Annotated[
        Path | None, typer.Option(help="Spec-Bench jsonl file, of all categories. Default: the built-in prompts.")
    ] = None,
    per_category: Annotated[int, typer.Option(min=1, help="Prompts of a category, or all where it has fewer.")] = 3,
    temperature: Annotated[float, typer.Option(help="Above 0.", min=0.001)] = 1.0,
    draft_len: DraftLenOption = 8,
    max_new_tokens: MaxNewTokensOption = 128,
    repeats: Annotated[int, typer.Option(help="Answers to each prompt in each case, each with a seed.", min=1)] = 3,
    json_file: JsonOption = None,
) -> None:
    """Compare block verification with token-wise verification in mode topk.

    Both take turns on each prompt, in an order that alternates from prompt to prompt and from seed to seed. The
    acceptance length is that of all rounds; ratios of times are medians over the answers. All ratios have a bootstrap
    95 % interval.
    """
    texts = {"built-in": list(OWN_PROMPTS)} if prompts is None else prompts_by_category(prompts, per_category)
    cases, limits = verification_cases(draft_len), AnswerLimits(max_new_tokens, inf)
    answers = repeats * sum(map(len, texts.values())) * len(cases)
    measured: dict[str, list[Measured]] = {}
    with progress_bar() as progress, PairRun(bundle, target, dtype) as pair:
        task = progress.add_task("answers", total=answers)
        for category, of_category in texts.items():
            progress.update(task, description=category)
            measured[category] = [
                pair.measure(
                    Cell(temperature),
                    cases[:: 1 if seed % 2 else -1],
                    Workload(of_category, limits, seed),
                    lambda: progress.advance(task),
                )
                for seed in range(1, repeats + 1)
            ]
        counts: Row = {"per_category": per_category, "repeats": repeats, "max_new_tokens": max_new_tokens}
        settings = {**pair.described(), "draft_len": draft_len, "temperature": temperature, **counts}
        results = Results(settings, verification_rows(measured))
    results.show(console)
    results.write(json_file)


def verification_cases(draft_len: int) -> list[Case]:
    """Both kinds of verification, with drafts of ``draft_len`` tokens."""
    return [Case(TOKEN, Mode.TOPK, draft_len), Case(BLOCK, Mode.TOPK, draft_len, block_verification=True)]


def verification_rows(measured: Mapping[str, Sequence[Measured]]) -> list[Row]:
    """A row per category, and one of all; figures are None where a case failed."""
    everything = [one for of_category in measured.values() for one in of_category]
    return [_row(category, runs) for category, runs in (*measured.items(), (ALL, everything))]


def _row(category: str, runs: Sequence[Measured]) -> Row:
    failures = [reason for run in runs for reason in run.failures.values()]
    pairs = [
        (token, block)
        for run in runs
        if not run.failures
        for token, block in zip(run.answers[TOKEN], run.answers[BLOCK], strict=True)
        if token.rounds and block.rounds
    ]
    row: Row = {"case": category, "answers": len(pairs)}
    if pairs:
        tokens, blocks = zip(*pairs, strict=True)
        row |= {
            "token_acceptance_length": _acceptance_length(tokens),
            "block_acceptance_length": _acceptance_length(blocks),
            "acceptance_length_ratio": _acceptance_length_ratio(tokens, blocks),
            "reply_ratio": _median_ratio(tokens, blocks, _reply_seconds),
            "tokens_per_second_ratio": _median_ratio(tokens, blocks, lambda one: one.tokens_per_second),
        }
    return {**row, "failed": failures[0] if failures else None}


def _acceptance_length(answers: Sequence[Throughput]) -> float:
    """Mean accepted tokens of all rounds, and the token after them."""
    return fmean(one.accepted + 1 for answer in answers for one in answer.rounds)


def _acceptance_length_ratio(tokens: Sequence[Throughput], blocks: Sequence[Throughput]) -> str:
    """Of block to token-wise verification; the bootstrap draws pairs of answers."""
    sums = [np.array([sum(one.accepted + 1 for one in answer.rounds) for answer in case]) for case in (blocks, tokens)]
    counts = [np.array([len(answer.rounds) for answer in case]) for case in (blocks, tokens)]

    def ratio(indices: npt.NDArray[np.int64]) -> float:
        block, token = (total[indices].sum() / count[indices].sum() for total, count in zip(sums, counts, strict=True))
        return float(block / token)

    indices = np.arange(len(tokens))
    low = high = ratio(indices)
    if len(tokens) > 1:
        interval = stats.bootstrap((indices,), ratio, vectorized=False, method="percentile", rng=1).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return _with_interval(ratio(indices), low, high)


def _median_ratio(
    tokens: Sequence[Throughput], blocks: Sequence[Throughput], figure: Callable[[Throughput], float]
) -> str:
    ratio = Ratio.of(list(map(figure, blocks)), list(map(figure, tokens)))
    return _with_interval(ratio.median, ratio.low, ratio.high)


def _reply_seconds(answer: Throughput) -> float:
    return fmean(one.reply_seconds for one in answer.rounds if one.reply_seconds is not None)


def _with_interval(ratio: float, low: float, high: float) -> str:
    return f"{ratio:.3f} ({low:.3f} to {high:.3f})"
