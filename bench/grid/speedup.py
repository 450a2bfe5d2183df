"""Tokens per second with drafting against the target alone, over loopback, in one run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from bench.setup.bench_setup import BenchSetup, bench_setup
from bench.setup.options import (
    BundleOption,
    CountOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    PromptsOption,
    TargetOption,
    UplinkKOption,
    console,
    progress_bar,
)
from bench.setup.prompts import read_prompts
from bench.setup.results import Results, Row, number
from bench.setup.station_process import running_station
from device.answers.answer import Answer
from device.settings import DraftSettings
from protocol.messages import MAX_TEMPERATURE, Mode, Sampling

WARM_UP_TOKENS = 16


def speedup(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    prompts: PromptsOption = None,
    count: CountOption = 8,
    max_new_tokens: MaxNewTokensOption = 128,
    draft_len: Annotated[
        int | None, typer.Option(help="Tokens drafted per round. Default: chosen by the planner.", min=1)
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(help="0 measures mode ids, above 0 modes coupled, topk and full.", min=0, max=MAX_TEMPERATURE),
    ] = 0.0,
    uplink_k: UplinkKOption = 32,
    json_file: JsonOption = None,
) -> None:
    """Compare tokens per second with drafting and with the target alone, over loopback."""
    texts = read_prompts(prompts, count)
    settings = SpeedupSettings(max_new_tokens, draft_len, temperature, uplink_k)
    with running_station(target, dtype) as address, bench_setup(bundle, address) as setup, progress_bar() as progress:
        task = progress.add_task("answers", total=len(texts) * len(settings.cases()))
        rows = measure_speedup(setup, texts, settings, lambda: progress.advance(task))
        measured = Results(_described(setup, settings, dtype), rows)
    measured.show(console)
    measured.write(json_file)


@dataclass(frozen=True)
class SpeedupSettings:
    """Tokens per answer, the draft length (None lets the planner choose), the temperature and K of mode ``topk``."""

    max_new_tokens: int
    draft_len: int | None
    temperature: float
    uplink_k: int

    def cases(self) -> list[DraftSettings]:
        """The target alone, then the modes of the temperature."""
        sampling = Sampling(self.temperature, seed=1)
        modes = [Mode.TARGET, Mode.IDS] if sampling.greedy else [Mode.TARGET, Mode.COUPLED, Mode.TOPK, Mode.FULL]
        return [DraftSettings(mode, sampling, self.uplink_k, self.draft_len) for mode in modes]


def measure_speedup(
    setup: BenchSetup, prompts: Sequence[str], settings: SpeedupSettings, advance: Callable[[], object]
) -> list[Row]:
    """A row per case. The cases take turns on each prompt, so that drift of the machine's speed affects all alike."""
    cases = settings.cases()
    answers: dict[Mode, list[Answer]] = {case.mode: [] for case in cases}
    setup.answer(setup.prompt_ids(prompts[0]), WARM_UP_TOKENS, cases[-1])  # the first forward passes are slow
    for prompt in prompts:
        for case in cases:
            answers[case.mode].append(setup.answer(setup.prompt_ids(prompt), settings.max_new_tokens, case))
            advance()
    rows = [_row(mode, of_mode) for mode, of_mode in answers.items()]
    for row in rows:
        row["speedup"] = number(row, "tokens_per_second") / number(rows[0], "tokens_per_second")
    return rows


def _described(setup: BenchSetup, settings: SpeedupSettings, dtype: str) -> Row:
    manifest = setup.model.manifest
    return {
        "target": setup.client.welcome.model,
        "target_dtype": dtype,
        "draft": manifest.name,
        "draft_precision": manifest.precision,
        "draft_len": settings.draft_len or "auto",
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "link": "loopback",
    }


def _row(mode: Mode, answers: Sequence[Answer]) -> Row:
    tokens = sum(len(answer.token_ids) for answer in answers)
    drafted = sum(answer.drafted for answer in answers)
    return {
        "case": str(mode),
        "tokens": tokens,
        "tokens_per_second": tokens / sum(answer.seconds for answer in answers),
        "acceptance_rate": sum(answer.accepted for answer in answers) / drafted if drafted else None,
        "tokens_per_round": tokens / sum(answer.rounds for answer in answers),
        "uplink_bytes_per_token": sum(answer.uplink_bytes for answer in answers) / tokens,
        "downlink_bytes_per_token": sum(answer.downlink_bytes for answer in answers) / tokens,
    }
