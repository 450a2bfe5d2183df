"""How many devices one base station serves: replayed devices, the target alone, and packed against dense passes.

With a draft model for PyTorch, also drafts from devices against that model beside the target.

All cases of a run take turns on one base station, so that their ratios are
meaningful on a shared machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from basestation.target.target_model import TargetModel
from bench.setup.options import (
    BundleOption,
    DraftLenOption,
    DtypeOption,
    JsonOption,
    TargetOption,
    TorchDeviceOption,
    WeightsOption,
    check_transformers_target,
    console,
    progress_bar,
)
from bench.setup.prompts import OWN_PROMPTS
from bench.setup.results import Results, Row, number
from bench.setup.station_process import station_process
from bench.station.colocation import measure_colocation
from bench.station.passes import load_dense, measure_passes
from bench.station.recorder import record
from bench.station.recording import Recording, read_recordings, write_recordings
from bench.station.replay import PREFILL_CASE, RUNNING_SESSIONS, CapacitySettings, measure_replay
from bench.station.replay_client import ReplayTiming
from device.drafting.draft_model import SequenceModel
from device.drafting.load_model import load_model
from device.text.tokenizer import Tokenizer
from protocol.bundle import Manifest
from protocol.errors import SettingsError

_KV_MEMORY = "1GiB"
"""Of the draft model and of the target where they run beside each other."""
_PASS_LEN = 5
"""New tokens of each session where passes are compared: a round of four drafted tokens."""
_TEMPLATE_END_LEN = 5
"""Tokens of the chat template after a user message."""


def capacity(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    weights: WeightsOption = "dtype",
    torch_device: TorchDeviceOption = "auto",
    draft: Annotated[
        str | None,
        typer.Option(help="Model that the bundle was converted from: also measure it beside the target."),
    ] = None,
    sessions: Annotated[int, typer.Option(help="Concurrent devices.", min=1)] = 16,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest prompt.", min=1)] = 100,
    longest: Annotated[int, typer.Option(help="Tokens of the longest prompt.", min=1)] = 600,
    draft_len: DraftLenOption = 8,
    answer_len: Annotated[int, typer.Option(help="Tokens per answer.", min=1)] = 48,
    token_ms: Annotated[
        float | None, typer.Option(help="Milliseconds to draft a token. Default: as recorded.", min=0)
    ] = None,
    delay_ms: Annotated[float, typer.Option(help="One-way delay of the link in milliseconds.", min=0)] = 0.0,
    seconds: Annotated[float, typer.Option(help="Duration of each turn of a case.", min=0.1)] = 5.0,
    turns: Annotated[int, typer.Option(help="Turns of each case.", min=1)] = 3,
    recording: Annotated[
        Path | None, typer.Option(help="File of recorded rounds: read if it exists, otherwise written.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure what one base station serves: replayed devices, the target alone, packed and dense passes."""
    check_transformers_target(target)
    timing = ReplayTiming(None if token_ms is None else token_ms / 1e3, delay_ms / 1e3)
    settings = CapacitySettings(
        sessions, (shortest, longest), draft_len, answer_len, seconds, turns=turns, timing=timing
    )
    with progress_bar() as progress:
        task = progress.add_task("measurements", total=None)
        measurement = _Measurement(
            bundle, target, dtype, weights, torch_device, draft, settings, lambda: progress.advance(task)
        )
        rows, described = measurement.run(recording)
    compared = ratios(rows, sessions)
    Results(described, rows).show(console)
    Results(described, compared).show(console)
    Results(described, [*rows, *compared]).write(json_file)


@dataclass(frozen=True)
class _Measurement:
    bundle: Path
    target: str
    dtype: str
    weights: str
    torch_device: str
    draft: str | None
    settings: CapacitySettings
    advance: Callable[[], object]

    def run(self, recording: Path | None) -> tuple[list[Row], Row]:
        """The rows, and what they depend on."""
        manifest, settings = Manifest.read(self.bundle), self.settings
        known = known_recordings(recording, settings)
        rows, recordings, target_name = self._run_models(recording, known, manifest)
        torch.cuda.empty_cache()
        options = ["--torch-device", self.torch_device, "--weights", self.weights]
        with station_process(self.target, self.dtype, options) as station:
            rows += measure_replay(station, recordings, manifest, settings, self.advance)
            if self.draft is not None:
                names = (self.draft, self.target)
                models = [TargetModel.load(name, self.dtype, self.torch_device, _KV_MEMORY) for name in names]
                rows += measure_colocation(station, models[0], models[1], recordings, manifest, settings, self.advance)
        token_seconds = settings.timing.token_seconds
        token_seconds = recordings[0].token_seconds if token_seconds is None else token_seconds
        described: Row = {
            "target": target_name,
            "dtype": self.dtype,
            "weights": self.weights,
            "draft_len": settings.draft_len,
            "contexts": "{} to {}".format(*settings.contexts),
            "token_milliseconds": 1e3 * token_seconds,
            "delay_milliseconds": 1e3 * settings.timing.delay_seconds,
            "seconds": settings.seconds,
            "turns": settings.turns,
        }
        return rows, described

    def _run_models(
        self, path: Path | None, known: list[Recording], manifest: Manifest
    ) -> tuple[list[Row], list[Recording], str]:
        """The rows of forward passes, the recordings and the target's name; frees the models afterwards."""
        model = None if known else load_model(self.bundle)
        target = TargetModel.load(self.target, self.dtype, self.torch_device, weights=self.weights)
        dense = load_dense(self.target, self.dtype, target.torch_device)
        rows = measure_pass_rows(target, dense, self.settings, self.advance)
        if model is not None:
            known = recorded(path, model, target, Tokenizer(self.bundle, manifest), self.settings, self.advance)
        return rows, known, target.name


def context_prompts(tokenizer: Tokenizer, settings: CapacitySettings) -> list[list[int]]:
    """A prompt per session, concatenated from the built-in ones; lengths from the shortest to the longest context."""
    prompts = []
    for index, length in enumerate(_spread(*settings.contexts, settings.sessions)):
        words = " ".join(OWN_PROMPTS[(index + offset) % len(OWN_PROMPTS)] for offset in range(length // 8 + 1))
        ids = tokenizer.encode_chat([{"role": "user", "content": words}])
        end = tokenizer.encode_chat([{"role": "user", "content": ""}])[-_TEMPLATE_END_LEN:]
        prompts.append([*ids[: length - len(end)], *end])
    return prompts


def known_recordings(path: Path | None, settings: CapacitySettings) -> list[Recording]:
    """The recordings in a file; none if it does not exist.

    Raises:
        SettingsError: the file has another format, or was recorded with other lengths than the rows would name.
    """
    if path is None or not path.exists():
        return []
    recordings = read_recordings(path)
    longest = max(len(draft) for one in recordings for draft in one.drafts)
    lengths = [len(one.prompt_ids) for one in recordings]
    if longest != settings.draft_len or lengths != _spread(*settings.contexts, settings.sessions):
        found = f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens and drafts of {longest}"
        raise SettingsError("recording", str(path), f"a new file; this one has {found}")
    return recordings


def recorded(
    path: Path | None,
    model: SequenceModel,
    target: TargetModel,
    tokenizer: Tokenizer,
    settings: CapacitySettings,
    advance: Callable[[], object],
) -> list[Recording]:
    """New recordings, which are written to the file if there is one."""
    prompts = context_prompts(tokenizer, settings)
    recordings = record(model, target, prompts, settings.answer_len, settings.draft_len, advance)
    if path is not None:
        write_recordings(path, recordings)
    return recordings


def measure_pass_rows(
    target: TargetModel, dense: Any, settings: CapacitySettings, advance: Callable[[], object]
) -> list[Row]:
    """Rows of packed and dense passes: with contexts of one length, and with lengths that differ by a factor of 4."""
    count, (shortest, longest) = settings.sessions, settings.contexts
    rows = []
    for contexts in ([(shortest + longest) // 2] * count, _spread(longest // 4, longest, count)):
        times = measure_passes(target, dense, contexts, _PASS_LEN)
        rows += [_pass_row("packed_pass", contexts, times.packed), _pass_row("dense_pass", contexts, times.dense)]
        advance()
    return rows


def ratios(rows: Sequence[Row], sessions: int) -> list[Row]:
    """The ratios that a run shows, each with its goal."""
    found = {(row["case"], row["sessions"], row.get("contexts")): row for row in rows}

    def speed(case: str, count: int) -> float:
        return number(found[case, count, None], "tokens_per_second")

    def p99(case: str) -> float:
        return number(found[case, RUNNING_SESSIONS, None], "p99_milliseconds")

    many, one, alone = speed("replay", sessions), speed("replay", 1), speed("target", sessions)
    outside = number(found["replay", sessions, None], "share_outside_forward")
    stalled = p99(PREFILL_CASE) / p99("rounds")
    compared: list[Row] = [
        _ratio(f"throughput, {sessions} sessions over 1", many / one, "at least 5"),
        _ratio(f"throughput, {sessions} sessions, drafting over target alone", many / alone, "at least 2.3"),
        _ratio("p99 round time, during prefills over without", stalled, "at most 2"),
        _ratio(f"share outside the forward pass, {sessions} sessions", outside, "below 0.08"),
    ]
    for (case, count, contexts), row in found.items():
        if case == "packed_pass":
            dense = number(found["dense_pass", count, contexts], "milliseconds")
            goal = "at least 1" if "to" in str(contexts) else "at least 0.85"
            ratio = dense / number(row, "milliseconds")
            compared.append(_ratio(f"throughput, packed over dense pass, contexts {contexts}", ratio, goal))
    return compared


def _ratio(case: str, ratio: float, goal: str) -> Row:
    return {"case": case, "ratio": ratio, "goal": goal}


def _pass_row(case: str, contexts: Sequence[int], seconds: float) -> Row:
    lengths = sorted({min(contexts), max(contexts)})
    return {
        "case": case,
        "sessions": len(contexts),
        "tokens_per_second": len(contexts) * _PASS_LEN / seconds,
        "milliseconds": 1e3 * seconds,
        "p99_milliseconds": None,
        "acceptance_rate": None,
        "share_outside_forward": None,
        "contexts": " to ".join(map(str, lengths)),
    }


def _spread(first: int, last: int, count: int) -> list[int]:
    return [first + (last - first) * index // max(1, count - 1) for index in range(count)]
