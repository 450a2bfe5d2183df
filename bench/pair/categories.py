"""The gain of a pair by category of prompt, over loopback: one core for the device, one for the base station."""

import os
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import Annotated

import typer

from bench.grid.cell_file import CellFile
from bench.grid.cells import AnswerLimits, Workload
from bench.grid.pair_run import PairRun
from bench.pair.category_rows import CategoryCell, category_cases, category_rows
from bench.pair.category_summary import display_rows, summary_rows
from bench.setup.options import (
    BundleOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    TargetOption,
    TemperaturesOption,
    WeightsOption,
    console,
    progress_bar,
)
from bench.setup.prompts import prompts_by_category
from bench.setup.results import Results, Row
from protocol.errors import SettingsError


def categories(
    bundle: BundleOption,
    target: TargetOption,
    prompts: Annotated[Path, typer.Option(help="Spec-Bench jsonl file: a category and turns in each line.")],
    dtype: DtypeOption = "bfloat16",
    weights: WeightsOption = "dtype",
    category: Annotated[list[str] | None, typer.Option(help="To measure; repeatable. Default: all.")] = None,
    per_category: Annotated[int, typer.Option(min=1, help="Prompts of a category, or all where it has fewer.")] = 6,
    temperatures: TemperaturesOption = None,
    max_new_tokens: MaxNewTokensOption = 128,
    repeats: Annotated[int, typer.Option(help="Answers to each prompt in each case.", min=1)] = 3,
    json_file: JsonOption = None,
) -> None:
    """Compare drafting with the target alone and with the draft model on the target's core, by category of prompt.

    The cases take turns on each prompt, in alternating order. Ratios are medians over the answers, with a bootstrap
    95 % interval. The JSON file is written category by category; the same command continues an interrupted run.
    """
    by_category = prompts_by_category(prompts, per_category)
    if unknown := [name for name in category or () if name not in by_category]:
        raise SettingsError("category", unknown[0], ", ".join(by_category))
    limits = AnswerLimits(max_new_tokens, inf)
    workloads = {
        CategoryCell(name, temperature): Workload(by_category[name] * repeats, limits)
        for temperature in temperatures or (0.0, 1.0)
        for name in category or by_category
    }
    with progress_bar() as progress, PairRun(bundle, target, dtype, weights) as pair:
        counts: Row = {"per_category": per_category, "repeats": repeats, "max_new_tokens": max_new_tokens}
        described = {**pair.described(), "prompts_hash": prompts_hash(by_category), **counts}
        measured = CellFile(json_file, described)
        missing = [cell for cell in workloads if not measured.is_done(cell, category_cases(cell.temperature))]
        answers = sum(len(workloads[cell].prompts) * len(category_cases(cell.temperature)) for cell in missing)
        task = progress.add_task("answers", total=answers)
        for cell in missing:
            progress.update(task, description=f"{cell.category}, temperature {cell.temperature:g}")
            measured.add(cell, measured_rows(pair, cell, workloads[cell], lambda: progress.advance(task)))
    rows = [row for cell in workloads for row in measured.rows_of(cell)]
    Results({}, [*display_rows(rows), *summary_rows(rows)]).show(console)


def measured_rows(pair: PairRun, cell: CategoryCell, workload: Workload, advance: Callable[[], object]) -> list[Row]:
    """Measure a category: a row per case, with the load average of the last minute."""
    cases = category_cases(cell.temperature)
    measured = pair.measure(cell.link, cases, workload, advance)
    rows = category_rows(cell, cases, measured, pair.model.manifest.target_quality)
    return [{**row, "load_average": os.getloadavg()[0]} for row in rows]


def prompts_hash(by_category: Mapping[str, Sequence[str]]) -> str:
    """Identifies the prompts of all categories, so that a file continues with the same ones."""
    return sha256(repr(by_category).encode()).hexdigest()[:8]
