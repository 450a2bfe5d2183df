"""What prompt lookup adds: the draft model with and without it, and lookup alone, over loopback."""

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Annotated

import typer

from bench.grid.cells import TARGET, AnswerLimits, Case, Cell, Workload
from bench.grid.pair_run import Measured, PairRun
from bench.grid.ratio import Ratio
from bench.grid.throughput import Throughput
from bench.pair.code_edits import CODE_EDITS
from bench.setup.options import (
    BundleOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    TargetOption,
    TemperatureOption,
    console,
    progress_bar,
)
from bench.setup.prompts import prompts_by_category
from bench.setup.results import Results, Row
from protocol.errors import SettingsError
from protocol.messages import Mode

CODE_EDIT = "code edit"
ALL = "all"


def lookup(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    prompts: Annotated[
        Path | None, typer.Option(help="Spec-Bench jsonl file. Default: the built-in code edits alone.")
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="Category of prompts to measure; repeatable. Default: all.")
    ] = None,
    per_category: Annotated[
        int, typer.Option(help="Prompts of a category of that file, or all where it has fewer.", min=1)
    ] = 6,
    temperature: TemperatureOption = 0.0,
    max_new_tokens: MaxNewTokensOption = 256,
    repeats: Annotated[int, typer.Option(help="Answers to each prompt in each case.", min=1)] = 3,
    ahead: Annotated[
        bool, typer.Option("--ahead/--one-at-a-time", help="Send Drafts ahead, as a device does by default.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Compare drafting with and without prompt lookup, and lookup without a draft model, by category of prompt.

    The cases take turns on each prompt, in alternating order. Ratios are medians over the answers, with a bootstrap
    95 % interval. The JSON file is written category by category.
    """
    texts = lookup_prompts(prompts, category, per_category)
    cases = lookup_cases(Mode.COUPLED if temperature else Mode.IDS, None if ahead else 0)
    measured: dict[str, Measured] = {}
    with progress_bar() as progress, PairRun(bundle, target, dtype) as pair:
        task = progress.add_task("answers", total=sum(map(len, texts.values())) * repeats * len(cases))
        counts: Row = {"per_category": per_category, "repeats": repeats, "max_new_tokens": max_new_tokens}
        settings = {**pair.described(), "temperature": temperature, "ahead": ahead, **counts}
        for name, of_category in texts.items():
            progress.update(task, description=name)
            workload = Workload(of_category * repeats, AnswerLimits(max_new_tokens, inf))
            measured[name] = pair.measure(Cell(temperature), cases, workload, lambda: progress.advance(task))
            results = Results(settings, lookup_rows(cases, measured))
            results.write(json_file)
    results.show(console)


def lookup_prompts(path: Path | None, categories: Sequence[str] | None, most: int) -> dict[str, list[str]]:
    """The prompts of each category: the built-in code edits, and at most ``most`` of each in a Spec-Bench file.

    Args:
        path: of the file, if there is one.
        categories: to measure; None or empty for all.
        most: prompts of a category of the file.

    Raises:
        SettingsError: there is no such category, or the file has another format.
    """
    known = {CODE_EDIT: list(CODE_EDITS), **(prompts_by_category(path, most) if path else {})}
    if unknown := [name for name in categories or () if name not in known]:
        raise SettingsError("category", unknown[0], ", ".join(known))
    return {name: known[name] for name in categories or known}


def lookup_cases(mode: Mode, drafts_ahead: int | None = 0) -> list[Case]:
    """The target alone, the draft model without and with prompt lookup, and lookup alone."""
    return [
        TARGET,
        Case("draft model", mode, drafts_ahead=drafts_ahead),
        Case("draft model and lookup", mode, drafts_ahead=drafts_ahead, lookup=True),
        Case("lookup alone", mode, drafts_ahead=drafts_ahead, lookup=True, has_draft_model=False),
    ]


def lookup_rows(cases: Sequence[Case], measured: Mapping[str, Measured]) -> list[Row]:
    """Rows of each category, and those of all where there are several."""
    rows = [row for name, one in measured.items() for row in _case_rows(name, cases, one)]
    if len(measured) > 1:
        answers = {
            case.name: [answer for one in measured.values() for answer in one.answers[case.name]] for case in cases
        }
        failures = {case: reason for one in measured.values() for case, reason in one.failures.items()}
        rows += _case_rows(ALL, cases, Measured(answers, failures))
    return rows


def _case_rows(category: str, cases: Sequence[Case], measured: Measured) -> list[Row]:
    """A row per case, with its ratios to the target alone and to the draft model."""
    answers = measured.answers
    rows: list[Row] = []
    for case in cases:
        of_case = answers[case.name]
        tokens = sum(one.tokens for one in of_case)
        rows.append(
            {
                "category": category,
                "case": case.name,
                "answers": len(of_case),
                "tokens_per_second": tokens / sum(one.seconds for one in of_case) if tokens else None,
                "tokens_per_verdict": tokens / sum(one.verdicts for one in of_case) if tokens else None,
                "uplink_bytes_per_token": sum(one.uplink_bytes for one in of_case) / tokens if tokens else None,
                "over_target": _ratio(answers, case, cases[0]),
                "over_draft_model": _ratio(answers, case, cases[1]),
                "failed": measured.failures.get(case.name),
            }
        )
    return rows


def _ratio(answers: Mapping[str, Sequence[Throughput]], case: Case, other: Case) -> str | None:
    """The median ratio of tokens per second over paired answers, with its interval; None where a case failed."""
    if len(answers[case.name]) != len(answers[other.name]):
        return None
    pairs = zip(answers[case.name], answers[other.name], strict=True)
    timed = [(one.tokens_per_second, another.tokens_per_second) for one, another in pairs if one.seconds]
    timed = [(one, another) for one, another in timed if another]
    return str(Ratio.of(*map(list, zip(*timed, strict=True)))) if timed else None
