"""Drafts in flight while Verdicts travel against one Draft at a time and the target alone, on emulated links."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy import stats

from bench.grid.cells import Cell
from bench.link.relay import relay_command
from bench.setup.bench_setup import BenchSetup, connected
from bench.setup.cores import Cores, running_on
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
from bench.setup.server_process import serving
from bench.setup.station_process import station_command
from device.answer import Answer
from device.draft_model import DraftModel
from device.planners import Planners
from device.round_model import run_tokens
from device.settings import DraftSettings
from device.tokenizer import Tokenizer
from protocol.messages import Mode, Sampling

TARGET_ALONE = "target alone"
_WARM_UP_TOKENS = 48


def ahead(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    prompts: PromptsOption = None,
    count: CountOption = 8,
    max_new_tokens: MaxNewTokensOption = 96,
    repeats: Annotated[int, typer.Option(help="Answers to each prompt in each case.", min=1)] = 3,
    round_trips: Annotated[
        list[float] | None,
        typer.Option("--round-trip-ms", help="Of the emulated link, 0 for loopback; repeatable. Default: 0 and 100."),
    ] = None,
    uplink_mbit: Annotated[float, typer.Option(help="Of the emulated link.")] = 50.0,
    temperatures: Annotated[
        list[float] | None,
        typer.Option("--temperature", help="0 measures mode ids, above 0 coupled; repeatable. Default: 0 and 1."),
    ] = None,
    draft_lens: Annotated[
        list[int] | None,
        typer.Option("--draft-len", min=1, help="Fixed draft lengths; repeatable. Default: 6, 8, 12, 16, 24."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Compare Drafts in flight with one Draft at a time and with the target alone; one core for each end.

    The cases take turns on each prompt, in alternating order. Ratios are medians over the answers, with a bootstrap
    95 % interval; times include the prompt.
    """
    links = [
        Cell(temperature, round_trip or None, uplink_mbit if round_trip else None)
        for temperature in temperatures or (0.0, 1.0)
        for round_trip in (round_trips or (0.0, 100.0))
    ]
    lens, texts = draft_lens or [6, 8, 12, 16, 24], read_prompts(prompts, count)
    workload = Workload(texts * repeats, lens, max_new_tokens)
    model, rows = DraftModel(bundle, threads=1), list[Row]()
    with progress_bar() as progress, serving(station_command(target, dtype), Cores.choose().station) as station:
        task = progress.add_task("answers", total=len(links) * len(workload.prompts) * (2 * len(lens) + 3))
        for cell in links:
            rows += _cell_rows(cell, station.address, bundle, model, workload, lambda: progress.advance(task))
    described: Row = {"target": target, "dtype": dtype, "draft": model.manifest.name, "uplink_mbit": uplink_mbit}
    counts: Row = {"prompts": len(texts), "repeats": repeats, "max_new_tokens": max_new_tokens}
    measured = Results({**described, **counts}, rows)
    measured.show(console)
    measured.write(json_file)


@dataclass(frozen=True)
class Workload:
    """What each case answers: ``prompts``, repetitions included, and with which fixed draft lengths."""

    prompts: Sequence[str]
    draft_lens: Sequence[int]
    max_new_tokens: int


def _cell_rows(
    cell: Cell, station: str, bundle: Path, model: DraftModel, workload: Workload, advance: Callable[[], object]
) -> list[Row]:
    """Measure one link: a row per case."""
    chosen, core = cases(cell.temperature, workload.draft_lens), Cores.choose().device
    with ExitStack() as stack:
        stack.enter_context(running_on(core))
        address = stack.enter_context(_linked(cell, station, core))
        setups = {
            name: stack.enter_context(
                connected(model, Tokenizer(bundle, model.manifest), address, Planners(model.manifest.quality))
            )
            for name in chosen
        }
        answers = _measure(setups, chosen, workload, advance)
        rows = _rows(setups, chosen, answers)
    return [{"temperature": cell.temperature, "round_trip_ms": cell.round_trip_ms or 0.0, **row} for row in rows]


def cases(temperature: float, draft_lens: Sequence[int]) -> dict[str, DraftSettings]:
    """The target alone, one Draft at a time with each draft length and planned, and Drafts ahead likewise."""
    sampling = Sampling(temperature, seed=1)
    mode = Mode.IDS if sampling.greedy else Mode.COUPLED
    chosen = {TARGET_ALONE: DraftSettings(Mode.TARGET, sampling, 1, None)}
    for name, drafts_ahead in (("one at a time", 0), ("ahead", None)):
        for draft_len in (None, *draft_lens):
            settings = DraftSettings(mode, sampling, 1, draft_len, drafts_ahead=drafts_ahead)
            chosen[f"{name}, {draft_len or 'auto'}"] = settings
    return chosen


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, with a bootstrap 95 % interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> "Ratio":
        """Of two figures of each answer, in the same order."""
        ratios = np.array(numerators) / np.array(denominators)
        if len(ratios) == 1:
            return cls(float(ratios[0]), float(ratios[0]), float(ratios[0]))
        interval = stats.bootstrap((ratios,), np.median, method="percentile", rng=1).confidence_interval
        return cls(float(np.median(ratios)), float(interval.low), float(interval.high))

    @property
    def text(self) -> str:
        """The median with its interval."""
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def _measure(
    setups: Mapping[str, BenchSetup],
    chosen: Mapping[str, DraftSettings],
    workload: Workload,
    advance: Callable[[], object],
) -> dict[str, list[Answer]]:
    answers: dict[str, list[Answer]] = {name: [] for name in chosen}
    for name, settings in chosen.items():  # the first forward passes are slow, and planners learn the link
        setups[name].answer(setups[name].prompt_ids(workload.prompts[0]), _WARM_UP_TOKENS, settings)
    for index, prompt in enumerate(workload.prompts):
        for name in list(chosen)[:: 1 if index % 2 else -1]:
            setup = setups[name]
            answers[name].append(setup.answer(setup.prompt_ids(prompt), workload.max_new_tokens, chosen[name]))
            advance()
    return answers


def _rows(
    setups: Mapping[str, BenchSetup], chosen: Mapping[str, DraftSettings], answers: Mapping[str, Sequence[Answer]]
) -> list[Row]:
    def rates(name: str) -> list[float]:
        return [answer.tokens_per_second for answer in answers[name]]

    alone = rates(TARGET_ALONE)
    fixed = [name for name, settings in chosen.items() if settings.draft_len and settings.drafts_ahead == 0]
    best = max(fixed, key=lambda name: float(np.median(rates(name))))
    return [_row(name, chosen[name], setups[name], answers[name], alone, rates(best)) for name in chosen]


def _row(
    name: str,
    settings: DraftSettings,
    setup: BenchSetup,
    answers: Sequence[Answer],
    alone: Sequence[float],
    best: Sequence[float],
) -> Row:
    rates = [answer.tokens_per_second for answer in answers]
    tokens, drafted = (sum(counts) for counts in zip(*((len(a.token_ids), a.drafted) for a in answers), strict=True))
    draft_bytes = sum(answer.draft_bytes for answer in answers)
    return {
        "case": name,
        "tokens_per_second": float(np.median(rates)),
        "ttft_seconds": float(np.median([answer.ttft_seconds for answer in answers])),
        "times_target_alone": Ratio.of(rates, alone).text,
        "times_best_fixed": Ratio.of(rates, best).text,
        "times_round_model": _round_model_ratio(settings, setup, rates),
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
