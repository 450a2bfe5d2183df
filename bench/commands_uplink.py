"""What is sent and what it costs: ``uplink``, ``encodings`` and ``overheads``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.setup.options import (
    BundleOption,
    DtypeOption,
    JsonOption,
    PromptsOption,
    TargetOption,
    console,
    progress_bar,
)
from protocol.messages import Sampling

if TYPE_CHECKING:  # the libraries behind it load when a command needs them
    from device.draft_model import DraftModel


def uplink(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "float32",
    prompts: PromptsOption = None,
    count: Annotated[int, typer.Option(help="How many prompts.")] = 20,
    rounds: Annotated[int, typer.Option(help="Rounds of 8 tokens for each.")] = 2,
    uplink_ks: Annotated[
        list[int] | None, typer.Option("--uplink-k", help="May be repeated; 1, 3, 8, 32, 128, 320, 3200 and all.")
    ] = None,
    temperatures: Annotated[
        list[float] | None, typer.Option("--temperature", help="May be repeated; 0, 0.7 and 1.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Bytes of a drafted token and how likely it stands, for each mode and K, at several temperatures."""
    from basestation.target_model import TargetModel
    from bench.setup.results import Results
    from bench.uplink.modes import TEMPERATURES, UPLINK_K, check_uplink_k, uplink_rows
    from bench.uplink.positions import collect

    model, prompt_ids = _draft_model_and_prompts(bundle, prompts, count)
    vocab_size = model.manifest.vocab_size
    kept = check_uplink_k(uplink_ks or [*UPLINK_K, vocab_size], vocab_size)
    samplings = [Sampling(temperature, seed=1) for temperature in temperatures or TEMPERATURES]
    judge = TargetModel.load(target, dtype)
    measured = Results(
        {"draft": model.manifest.name, "target": judge.name, "dtype": dtype, "vocab_size": vocab_size}, []
    )
    with progress_bar() as progress:
        task = progress.add_task("prompts", total=len(prompt_ids) * len(samplings))
        for sampling in samplings:
            corpus = collect(model, judge, prompt_ids, rounds, sampling, lambda: progress.advance(task))
            measured = Results(measured.settings, [*measured.rows, *uplink_rows(corpus, kept)])
            measured.write(json_file)
    measured.show(console)


def encodings(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "float32",
    prompts: PromptsOption = None,
    count: Annotated[int, typer.Option(help="How many prompts.")] = 20,
    rounds: Annotated[int, typer.Option(help="Rounds of 8 tokens for each.")] = 2,
    uplink_k: Annotated[int, typer.Option(help="Entries kept of each distribution.")] = 32,
    json_file: JsonOption = None,
) -> None:
    """Bytes of a drafted token against what its rounding costs in acceptance, for each encoding."""
    from basestation.target_model import TargetModel
    from bench.uplink.encodings import SAMPLING, measure, results
    from bench.uplink.positions import collect

    model, prompt_ids = _draft_model_and_prompts(bundle, prompts, count)
    judge = TargetModel.load(target, dtype)
    with progress_bar() as progress:
        task = progress.add_task("prompts", total=len(prompt_ids))
        corpus = collect(model, judge, prompt_ids, rounds, SAMPLING, lambda: progress.advance(task))
    measured = results(measure(corpus, uplink_k), corpus, model.manifest.name, judge.name)
    measured.show(console)
    measured.write(json_file)


def overheads(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    prompts: PromptsOption = None,
    sessions: Annotated[int, typer.Option(help="In one pass of the target, each with a prompt.")] = 16,
    tokens: Annotated[int, typer.Option(help="Drafted for each.")] = 40,
    json_file: JsonOption = None,
) -> None:
    """What the noise of mode coupled and the encoding of drafts cost, against drafting and a pass."""
    from basestation.target_model import TargetModel
    from bench.setup.results import Results
    from bench.uplink.overheads import device_rows, station_rows

    model, prompt_ids = _draft_model_and_prompts(bundle, prompts, sessions)
    with progress_bar() as progress:
        task = progress.add_task("prompts", total=len(prompt_ids))
        rows, texts = device_rows(model, prompt_ids, tokens, lambda: progress.advance(task))
    rows += station_rows(TargetModel.load(target, dtype), texts)
    measured = Results({"draft": model.manifest.name, "target": target, "dtype": dtype, "sessions": sessions}, rows)
    measured.show(console)
    measured.write(json_file)


def _draft_model_and_prompts(bundle: Path, prompts: Path | None, count: int) -> tuple["DraftModel", list[list[int]]]:
    from bench.setup.prompts import read_prompts
    from device.draft_model import DraftModel
    from device.tokenizer import Tokenizer

    chosen, model = read_prompts(prompts, count), DraftModel(bundle)
    tokenizer = Tokenizer(bundle, model.manifest)
    return model, [tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt in chosen]
