"""One base station and many devices: ``capacity``, ``churn``, ``prefixes`` and ``ceiling``."""

from pathlib import Path
from typing import Annotated

import typer

from bench.setup.options import (
    BundleOption,
    DtypeOption,
    JsonOption,
    TargetOption,
    TorchDeviceOption,
    console,
    progress_bar,
)
from protocol.errors import SettingsError


def capacity(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    torch_device: TorchDeviceOption = "auto",
    sessions: Annotated[int, typer.Option(help="Devices at once.")] = 16,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest prompt.")] = 100,
    longest: Annotated[int, typer.Option(help="Tokens of the longest.")] = 600,
    draft_len: Annotated[int, typer.Option(help="Tokens drafted in a round.")] = 8,
    answer_len: Annotated[int, typer.Option(help="Tokens of an answer.")] = 48,
    think: Annotated[
        float | None, typer.Option(help="Milliseconds a device drafts a token; left out, as recorded.")
    ] = None,
    delay: Annotated[float, typer.Option(help="Milliseconds one way over the link.")] = 0.0,
    seconds: Annotated[float, typer.Option(help="Of each turn of a case.")] = 5.0,
    turns: Annotated[int, typer.Option(help="Of each case.")] = 3,
    recording: Annotated[
        Path | None, typer.Option(help="File of recorded rounds: read where it exists, written where not.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """What one base station serves: replayed devices, the target alone, and a pass against a dense batch."""
    import torch

    from basestation.target_model import TargetModel
    from bench.setup.results import Results, Value
    from bench.setup.station_process import station_process
    from bench.station.capacity import CapacitySettings, measure_pass_rows, measure_replay, ratios, recorded
    from bench.station.passes import load_dense
    from bench.station.replay import Pace
    from device.draft_model import DraftModel
    from device.tokenizer import Tokenizer

    pace = Pace(None if think is None else think / 1e3, delay / 1e3)
    settings = CapacitySettings(sessions, (shortest, longest), draft_len, answer_len, seconds, turns=turns, pace=pace)
    model, judge = DraftModel(bundle), TargetModel.load(target, dtype, torch_device)
    manifest, name = model.manifest, judge.name
    with progress_bar() as progress:
        task = progress.add_task("measurements", total=None)
        dense = load_dense(target, dtype, judge.torch_device)
        rows = measure_pass_rows(judge, dense, settings, lambda: progress.advance(task))
        tokenizer = Tokenizer(bundle, manifest)
        recordings = recorded(recording, model, judge, tokenizer, settings, lambda: progress.advance(task))
        del dense, judge, model
        torch.cuda.empty_cache()
        with station_process(target, dtype, ["--torch-device", torch_device]) as station:
            rows += measure_replay(station, recordings, manifest, settings, lambda: progress.advance(task))
    facts: dict[str, Value] = {
        "target": name,
        "dtype": dtype,
        "draft_len": draft_len,
        "contexts": f"{shortest} to {longest}",
        "token_milliseconds": 1e3 * recordings[0].token_seconds if think is None else think,
        "delay_milliseconds": delay,
        "seconds": seconds,
        "turns": turns,
    }
    compared = ratios(rows, sessions)
    Results(facts, rows).show(console)
    Results(facts, compared).show(console)
    Results(facts, [*rows, *compared]).write(json_file)


def churn(
    bundle: BundleOption,
    target: TargetOption,
    recording: Annotated[Path, typer.Option(help="Rounds that edgedraft-bench capacity --recording wrote.")],
    dtype: DtypeOption = "bfloat16",
    sessions: Annotated[int, typer.Option(help="In all.")] = 1000,
    seconds: Annotated[float, typer.Option(help="In which they come.")] = 600.0,
    at_once: Annotated[int, typer.Option(help="At the same time.")] = 32,
    idle_timeout: Annotated[int, typer.Option(help="How long the station keeps one whose device is gone.")] = 30,
    kv_memory: Annotated[str, typer.Option(help="Of the station, for keys and values.")] = "512MiB",
    json_file: JsonOption = None,
) -> None:
    """A base station's memory while devices come, go and vanish."""
    from bench.setup.results import Results
    from bench.setup.station_process import station_process
    from bench.station.churn import ChurnSettings, measure_churn
    from bench.station.replay import read_recordings
    from device.draft_model import DraftModel

    recordings, manifest = read_recordings(recording), DraftModel(bundle).manifest
    settings = ChurnSettings(sessions, seconds, at_once)
    options = ["--idle-timeout", str(idle_timeout), "--kv-memory", kv_memory]
    with progress_bar() as progress, station_process(target, dtype, options) as station:
        task = progress.add_task("churn", total=10)
        rows = measure_churn(station, recordings, manifest, settings, lambda: progress.advance(task))
    measured = Results({"target": target, "dtype": dtype, "at_once": at_once, "kv_memory": kv_memory}, rows)
    measured.show(console)
    measured.write(json_file)


def prefixes(
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    torch_device: TorchDeviceOption = "auto",
    sessions: Annotated[int, typer.Option(help="In one pass.")] = 16,
    context: Annotated[int, typer.Option(help="Tokens of each.")] = 350,
    shared: Annotated[int, typer.Option(help="Of these, the tokens that all begin with.")] = 256,
    draft_len: Annotated[int, typer.Option(help="Tokens drafted in a round.")] = 4,
    json_file: JsonOption = None,
) -> None:
    """What a beginning that sessions have in common costs in a pass, and what it saves."""
    from basestation.target_model import TargetModel
    from bench.setup.results import Results
    from bench.station.prefixes import measure_prefixes

    judge = TargetModel.load(target, dtype, torch_device)
    with progress_bar() as progress:
        task = progress.add_task("measurements", total=None)
        rows = measure_prefixes(judge, sessions, context, shared, draft_len + 1, lambda: progress.advance(task))
    measured = Results({"target": judge.name, "dtype": dtype, "context": context, "draft_len": draft_len}, rows)
    measured.show(console)
    measured.write(json_file)


def ceiling(
    shape: Annotated[str, typer.Option(help="Of the target: 7b or 135m.")] = "7b",
    dtype: DtypeOption = "bfloat16",
    torch_device: TorchDeviceOption = "auto",
    sessions: Annotated[
        list[int] | None, typer.Option(help="In one pass; may be repeated; 1, 4, 16, 64 and 256.")
    ] = None,
    contexts: Annotated[
        list[int] | None, typer.Option("--context", help="Tokens of each; may be repeated; 512 and 2048.")
    ] = None,
    draft_len: Annotated[int, typer.Option(help="Tokens drafted in a round.")] = 5,
    json_file: JsonOption = None,
) -> None:
    """Passes of a large target with random weights against a dense batch, and against no drafts: meant for CUDA."""
    from basestation.target_model import choose_dtype, choose_placement
    from bench.setup.results import Results, Row, Value
    from bench.station.ceiling import CASES, SHAPES, Ceiling, card, combinations, compare

    if shape not in SHAPES:
        raise SettingsError("shape", shape, " or ".join(SHAPES))
    wanted = combinations(contexts or (512, 2048), sessions or (1, 4, 16, 64, 256), draft_len)
    placement = choose_placement(torch_device)
    facts: dict[str, Value] = {"card": card(placement), "shape": shape, "dtype": dtype, "draft_len": draft_len}
    measured = Ceiling(SHAPES[shape], choose_dtype(dtype, placement), placement)
    rows: list[Row] = []
    with progress_bar() as progress:
        task = progress.add_task("cases", total=len(wanted) * len(CASES))
        for combination in wanted:
            rows += measured.rows(combination, lambda: progress.advance(task))
            Results(facts, [*rows, *compare(rows)]).write(json_file)
    Results(facts, [*rows, *compare(rows)]).show(console)
