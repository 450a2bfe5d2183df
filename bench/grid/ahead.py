"""Drafts in flight while Verdicts travel against one Draft at a time and the target alone, on emulated links."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bench.grid.cells import Cell
from bench.grid.ratio import Ratio
from bench.link.relay import relay_command
from bench.setup.bench_setup import BenchSetup, connected
from bench.setup.cores import Cores, running_on
from bench.setup.options import (
    MIN_MBIT,
    BundleOption,
    CountOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    PromptsOption,
    TargetOption,
    TemperaturesOption,
    WeightsOption,
    console,
    progress_bar,
)
from bench.setup.prompts import read_prompts
from bench.setup.results import Results, Row
from bench.setup.server_process import serving
from bench.setup.station_process import station_command
from common.round_model import run_tokens
from device.answers.answer import Answer
from device.drafting.draft_model import SequenceModel
from device.drafting.load_model import load_model
from device.planning.planners import Planners
from device.settings import DraftSettings
from device.text.tokenizer import Tokenizer
from protocol.errors import SettingsError
from protocol.messages import Mode, Sampling

TARGET_ALONE = "target alone"
_WARM_UP_TOKENS = 48


def ahead(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    weights: WeightsOption = "dtype",
    prompts: PromptsOption = None,
    count: CountOption = 8,
    max_new_tokens: MaxNewTokensOption = 96,
    repeats: Annotated[int, typer.Option(help="Answers to each prompt in each case.", min=1)] = 3,
    round_trips: Annotated[
        list[float] | None,
        typer.Option(
            "--round-trip-ms", help="Of the emulated link, 0 for loopback; repeatable. Default: 0 and 100.", min=0
        ),
    ] = None,
    uplinks: Annotated[
        list[float] | None,
        typer.Option(
            "--uplink-mbit", help="Of the emulated link; repeatable. Default: 50, on loopback no limit.", min=MIN_MBIT
        ),
    ] = None,
    temperatures: TemperaturesOption = None,
    mode: Annotated[
        Mode | None, typer.Option(help="Of all Drafts. Default: ids at temperature 0, coupled above it.")
    ] = None,
    draft_lens: Annotated[
        list[int] | None,
        typer.Option("--draft-len", min=1, help="Fixed draft lengths; repeatable. Default: 6, 8, 12, 16, 24."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Compare Drafts in flight with one Draft at a time and with the target alone; one core for each end.

    The cases take turns on each prompt, in alternating order. Ratios are medians over the answers, with a bootstrap
    95 % interval. Tokens per second count from the first tokens on, those of whole answers include the prompt.
    """
    if mode is Mode.TARGET:
        raise SettingsError("mode", mode.value, "a mode that drafts; the target alone is measured with each")
    links = [
        Cell(temperature, round_trip if round_trip or uplinks else None, uplink if round_trip or uplinks else None)
        for temperature in temperatures or (0.0, 1.0)
        for round_trip in round_trips or (0.0, 100.0)
        for uplink in uplinks or (50.0,)
    ]
    lens, texts = draft_lens or [6, 8, 12, 16, 24], read_prompts(prompts, count)
    workload = Workload(texts * repeats, lens, max_new_tokens, mode)
    model, rows = load_model(bundle, threads=1), list[Row]()
    command = station_command(target, dtype, "--weights", weights)
    with progress_bar() as progress, serving(command, Cores.choose().station) as station:
        task = progress.add_task("answers", total=len(links) * len(workload.prompts) * (2 * len(lens) + 3))
        for cell in links:
            rows += _cell_rows(cell, station.address, bundle, model, workload, lambda: progress.advance(task))
    described: Row = {"target": target, "dtype": dtype, "weights": weights, "draft": model.manifest.name}
    counts: Row = {"prompts": len(texts), "repeats": repeats, "max_new_tokens": max_new_tokens}
    measured = Results({**described, **counts}, rows)
    measured.show(console)
    measured.write(json_file)


@dataclass(frozen=True)
class Workload:
    """What each case answers: ``prompts``, repetitions included, with which fixed draft lengths and in which mode."""

    prompts: Sequence[str]
    draft_lens: Sequence[int]
    max_new_tokens: int
    mode: Mode | None


@dataclass(frozen=True)
class TimedAnswer:
    """An answer, and its tokens per second after the first have arrived; of all, if they came at once."""

    answer: Answer
    tokens_per_second: float

    @classmethod
    def measure(cls, setup: BenchSetup, prompt: str, max_new_tokens: int, settings: DraftSettings) -> "TimedAnswer":
        """Measure one answer in a session of its own."""
        conversation = setup.conversation(settings)
        stream = conversation.ask(setup.prompt_ids(prompt), max_new_tokens)
        arrivals: list[tuple[float, int]] = []
        for _ in stream:
            if not arrivals or len(conversation.token_ids) > arrivals[-1][1]:
                arrivals.append((time.monotonic(), len(conversation.token_ids)))
        conversation.close()
        (first, before), (last, after) = arrivals[0], arrivals[-1]
        whole = stream.answer
        return cls(whole, (after - before) / (last - first) if last > first else whole.tokens_per_second)


@dataclass(frozen=True)
class Compared:
    """The answers that others are compared with: of the target, and of the fixed draft lengths with the best median."""

    alone: Sequence[TimedAnswer]
    best_one_at_a_time: Sequence[TimedAnswer]
    best: Sequence[TimedAnswer]


def _cell_rows(
    cell: Cell, station: str, bundle: Path, model: SequenceModel, workload: Workload, advance: Callable[[], object]
) -> list[Row]:
    """Measure one link: a row per case."""
    chosen, core = cases(cell.temperature, workload.draft_lens, workload.mode), Cores.choose().device
    with ExitStack() as stack:
        stack.enter_context(running_on(core))
        address = stack.enter_context(_linked(cell, station, core))
        setups = {
            name: stack.enter_context(
                connected(model, Tokenizer(bundle, model.manifest), address, Planners(model.manifest.target_quality))
            )
            for name in chosen
        }
        answers = _measure(setups, chosen, workload, advance)
        rows = _rows(setups, chosen, answers)
    return [{**cell.columns(), **row} for row in rows]


def cases(temperature: float, draft_lens: Sequence[int], mode: Mode | None = None) -> dict[str, DraftSettings]:
    """The target alone, one Draft at a time with each draft length and planned, and Drafts ahead likewise."""
    sampling = Sampling(temperature, seed=1)
    mode = mode or (Mode.IDS if sampling.greedy else Mode.COUPLED)
    chosen = {TARGET_ALONE: DraftSettings(Mode.TARGET, sampling, 1, None)}
    for name, drafts_ahead in (("one at a time", 0), ("ahead", None)):
        for draft_len in (None, *draft_lens):
            settings = DraftSettings(mode, sampling, 1, draft_len, drafts_ahead=drafts_ahead)
            chosen[f"{name}, {draft_len or 'auto'}"] = settings
    return chosen


def _measure(
    setups: Mapping[str, BenchSetup],
    chosen: Mapping[str, DraftSettings],
    workload: Workload,
    advance: Callable[[], object],
) -> dict[str, list[TimedAnswer]]:
    answers: dict[str, list[TimedAnswer]] = {name: [] for name in chosen}
    for name, settings in chosen.items():  # the first forward passes are slow, and planners learn the link
        setups[name].answer(setups[name].prompt_ids(workload.prompts[0]), _WARM_UP_TOKENS, settings)
    for index, prompt in enumerate(workload.prompts):
        for name in list(chosen)[:: 1 if index % 2 else -1]:
            answers[name].append(TimedAnswer.measure(setups[name], prompt, workload.max_new_tokens, chosen[name]))
            advance()
    return answers


def _rows(
    setups: Mapping[str, BenchSetup],
    chosen: Mapping[str, DraftSettings],
    answers: Mapping[str, Sequence[TimedAnswer]],
) -> list[Row]:
    fixed = [name for name, settings in chosen.items() if settings.mode is not Mode.TARGET and settings.draft_len]
    one_at_a_time = [name for name in fixed if chosen[name].drafts_ahead == 0]
    best, best_one_at_a_time = (
        answers[max(names, key=lambda name: float(np.median(_rates(answers[name]))))]
        for names in (fixed, one_at_a_time)
    )
    compared = Compared(answers[TARGET_ALONE], best_one_at_a_time, best)
    return [_row(name, chosen[name], setups[name], answers[name], compared) for name in chosen]


def _rates(timed: Sequence[TimedAnswer]) -> list[float]:
    return [one.tokens_per_second for one in timed]


def _whole_rates(timed: Sequence[TimedAnswer]) -> list[float]:
    return [one.answer.tokens_per_second for one in timed]


def _row(
    name: str, settings: DraftSettings, setup: BenchSetup, timed: Sequence[TimedAnswer], compared: Compared
) -> Row:
    answers, rates = [one.answer for one in timed], _rates(timed)
    tokens, drafted = (sum(counts) for counts in zip(*((len(a.token_ids), a.drafted) for a in answers), strict=True))
    draft_bytes = sum(answer.draft_bytes for answer in answers)
    return {
        "case": name,
        "tokens_per_second": float(np.median(rates)),
        "times_target_alone": str(Ratio.of(rates, _rates(compared.alone))),
        "times_best_one_at_a_time": str(Ratio.of(rates, _rates(compared.best_one_at_a_time))),
        "times_best_fixed": str(Ratio.of(rates, _rates(compared.best))),
        "times_round_model": _round_model_ratio(settings, setup, rates),
        "ttft_seconds": float(np.median([answer.ttft_seconds for answer in answers])),
        "whole_times_target_alone": str(Ratio.of(_whole_rates(timed), _whole_rates(compared.alone))),
        "whole_times_best_one_at_a_time": str(Ratio.of(_whole_rates(timed), _whole_rates(compared.best_one_at_a_time))),
        "whole_times_best_fixed": str(Ratio.of(_whole_rates(timed), _whole_rates(compared.best))),
        "acceptance_rate": sum(answer.accepted for answer in answers) / drafted if drafted else None,
        "uplink_bytes_per_token": sum(answer.uplink_bytes for answer in answers) / tokens,
        "invalidated_share": sum(answer.invalidated_bytes for answer in answers) / draft_bytes if draft_bytes else None,
    }


def _round_model_ratio(settings: DraftSettings, setup: BenchSetup, rates: Sequence[float]) -> float | None:
    """The rate over that of the round model with the planner's estimates, for Drafts ahead that it plans."""
    planner = setup.planners.for_settings(settings, setup.client.welcome)
    if not planner.drafts_ahead or settings.draft_len:
        return None
    seconds = planner.times.run_seconds(planner.alpha, planner.planned_len, planner.drafts_ahead)
    return float(np.median(rates)) * seconds / run_tokens(planner.alpha)


@contextmanager
def _linked(cell: Cell, address: str, core: int) -> Iterator[str]:
    """The address of the base station at the device's end of the link."""
    if cell.round_trip_ms is None:
        yield address
        return
    with serving(relay_command(address, cell.up, cell.down), core) as relay:
        yield relay.address
