"""The same pair in other programs: one run, the same prompts, at temperature 0."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import typer

from bench.grid.ratio import Ratio
from bench.pair.peer_cases import OWN, OWN_INT8, PairFiles, PeerAnswer, PeerCase, peer_cases
from bench.setup.options import (
    BundleOption,
    CountOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    PromptsOption,
    TargetOption,
    console,
    progress_bar,
)
from bench.setup.prompts import read_prompts
from bench.setup.results import Results, Row
from device.text.tokenizer import Tokenizer
from protocol.bundle import Manifest
from protocol.errors import EdgedraftError

_WARM_UP_TOKENS = 16


def peers(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    draft: Annotated[str | None, typer.Option(help="Model that the bundle was converted from.")] = None,
    small_draft: Annotated[str | None, typer.Option(help="Small model with another tokenizer.")] = None,
    target_gguf: Annotated[Path | None, typer.Option(help="The target for llama.cpp.")] = None,
    draft_gguf: Annotated[Path | None, typer.Option(help="The draft model for llama.cpp.")] = None,
    node_folder: Annotated[Path, typer.Option(help="Where `make peers` installed node-llama-cpp.")] = (
        Path("build/peers")
    ),
    prompts: PromptsOption = None,
    count: CountOption = 6,
    max_new_tokens: MaxNewTokensOption = 96,
    repeats: Annotated[int, typer.Option(help="Answers to each prompt in each case.", min=1)] = 3,
    json_file: JsonOption = None,
) -> None:
    """Compare with transformers' assisted generation, llama.cpp and autodraft-sd; a row says why one cannot run.

    The cases take turns on each prompt, in alternating order, and all use all cores. Ratios are medians over the
    answers, with a bootstrap 95 % interval; times include the prompt.
    """
    threads, texts = len(os.sched_getaffinity(0)), read_prompts(prompts, count)
    files = PairFiles(bundle, target, dtype, draft, small_draft, target_gguf, draft_gguf, node_folder, threads)
    tokenizer = Tokenizer(bundle, Manifest.read(bundle))
    prompt_ids = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts] * repeats
    with ExitStack() as stack:
        with console.status("loading the models"):
            cases = peer_cases(files, stack)
        progress = stack.enter_context(progress_bar())
        task = progress.add_task("answers", total=len(cases) * len(prompt_ids))
        rows = peer_rows(cases, prompt_ids, max_new_tokens, lambda: progress.advance(task))
    counts: Row = {"prompts": count, "repeats": repeats, "max_new_tokens": max_new_tokens, "threads": threads}
    models: Row = {"target": target, "dtype": dtype, "draft": Manifest.read(bundle).name, "small_draft": small_draft}
    Results({}, [{name: row[name] for name in row if name != "missing"} for row in rows]).show(console)
    for row in rows:
        if row["missing"]:
            console.print(f"{row['case']}: {row['missing']}")
    Results({**models, **counts}, rows).write(json_file)


@dataclass(frozen=True)
class TimedAnswer:
    """An answer and its seconds, from the prompt to the last token."""

    answer: PeerAnswer
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """With the prompt included."""
        return len(self.answer.token_ids) / self.seconds


def peer_rows(
    cases: Sequence[PeerCase], prompts: Sequence[list[int]], max_new_tokens: int, advance: Callable[[], object]
) -> list[Row]:
    """A row per case; one that fails is not asked again, and has no figures."""
    missing = {case.name: case.missing for case in cases}
    answers: dict[str, list[TimedAnswer]] = {case.name: [] for case in cases}
    for case in cases:
        _ask(case, prompts[0], _WARM_UP_TOKENS, missing)  # the first forward passes are slow
    for index, prompt in enumerate(prompts):
        for case in cases[:: -1 if index % 2 else 1]:
            if timed := _ask(case, prompt, max_new_tokens, missing):
                answers[case.name].append(timed)
            advance()
    for name, reason in missing.items():
        if reason:
            answers[name] = []
    return [_row(case, answers, missing[case.name]) for case in cases]


def _ask(case: PeerCase, prompt: list[int], count: int, missing: dict[str, str | None]) -> TimedAnswer | None:
    """An answer, or None and the reason in ``missing``."""
    if case.answer is None or missing[case.name]:
        return None
    began = perf_counter()
    try:
        return TimedAnswer(case.answer(prompt, count), perf_counter() - began)
    except EdgedraftError as error:
        missing[case.name] = str(error)
        return None


def _row(case: PeerCase, answers: Mapping[str, Sequence[TimedAnswer]], missing: str | None) -> Row:
    found, alone = answers[case.name], answers.get(case.target_alone, ())
    tokens = sum(len(one.answer.token_ids) for one in found)
    sent = [one.answer.link_bytes for one in found if one.answer.link_bytes is not None]
    same = [one.answer.token_ids == other.answer.token_ids for one, other in zip(found, alone, strict=False)]
    return {
        "case": case.name,
        "tokens_per_second": median(one.tokens_per_second for one in found) if found else None,
        "over_its_target_alone": _ratio(found, alone),
        "edgedraft_over_it": _ratio(answers[OWN], found),
        "edgedraft_int8_over_it": _ratio(answers.get(OWN_INT8, ()), found),
        "link_bytes_per_token": sum(sent) / tokens if sent else None,
        "same_answers": f"{sum(same)} of {len(same)}" if same else None,
        "missing": missing,
    }


def _ratio(answers: Sequence[TimedAnswer], others: Sequence[TimedAnswer]) -> str | None:
    if not answers or len(answers) != len(others):
        return None
    rates = [[one.tokens_per_second for one in side] for side in (answers, others)]
    return str(Ratio.of(*rates))
