"""The cost of a round besides the two models: the noise of mode coupled, and encoding and decoding of Drafts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import median
from time import perf_counter
from typing import Annotated

import typer

from basestation.target.segment import Segment
from basestation.target.target_model import TargetModel
from basestation.verification.target_sampling import SamplingRow, sample_target_tokens
from bench.setup.options import (
    BatchSessionsOption,
    BundleOption,
    DtypeOption,
    JsonOption,
    PromptsOption,
    TargetOption,
    console,
    progress_bar,
)
from bench.setup.results import Results, Row
from bench.uplink.positions import load_draft_model
from device.drafting.draft_model import SequenceModel
from device.drafting.drafter import Drafter
from device.drafting.sampling import coupled_token
from device.settings import UplinkSettings
from protocol.frames import FrameCodec
from protocol.messages import Draft, Mode, Sampling

GREEDY, SAMPLED = Sampling(), Sampling(1.0, seed=1)
DRAFT_LEN = 8
UPLINK_K = 32
_REPEATS = 9


def overheads(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    prompts: PromptsOption = None,
    sessions: BatchSessionsOption = 16,
    tokens: Annotated[int, typer.Option(help="Tokens drafted per prompt.", min=1)] = 40,
    json_file: JsonOption = None,
) -> None:
    """Measure the cost of mode coupled's noise and of encoding Drafts, relative to the models."""
    model, prompt_ids = load_draft_model(bundle, prompts, sessions)
    with progress_bar() as progress:
        task = progress.add_task("prompts", total=len(prompt_ids))
        rows, sequences = device_rows(model, prompt_ids, tokens, lambda: progress.advance(task))
    rows += station_rows(TargetModel.load(target, dtype), sequences)
    measured = Results({"draft": model.manifest.name, "target": target, "dtype": dtype, "sessions": sessions}, rows)
    measured.show(console)
    measured.write(json_file)


@dataclass
class _DeviceTimes:
    """Seconds of each measured step on the device."""

    draft: list[float] = field(default_factory=list)
    coupled: list[float] = field(default_factory=list)
    greedy: list[float] = field(default_factory=list)
    round: list[float] = field(default_factory=list)
    codec: list[float] = field(default_factory=list)


def device_rows(
    model: SequenceModel, prompts: Sequence[list[int]], tokens: int, advance: Callable[[], object]
) -> tuple[list[Row], list[list[int]]]:
    """The device's rows, and each prompt with the tokens that the draft model sampled at temperature 1."""
    times = _DeviceTimes()
    sequences: list[list[int]] = []
    codec = FrameCodec(model.manifest.vocab_size)
    for prompt in prompts:
        sequences.append(_time_tokens(model, prompt, tokens, times))
        _time_round(model, sequences[-1], codec, times)
        advance()
    coupled, noise = median(times.coupled), median(times.coupled) - median(times.greedy)
    token = median(times.draft) + coupled
    return [
        _row("coupled: sample a drafted token", coupled, "draft a token", token),
        _row("of which the noise", noise, "draft a token", token),
        _row(f"encode and decode topk, K = {UPLINK_K}", median(times.codec), "draft a round", median(times.round)),
    ], sequences


def station_rows(target: TargetModel, sequences: Sequence[list[int]]) -> list[Row]:
    """The base station's rows: a forward pass that verifies ``DRAFT_LEN`` tokens of every sequence."""
    new = DRAFT_LEN + 1
    kv_caches = [target.new_kv_cache() for _ in sequences]
    pairs = list(zip(kv_caches, sequences, strict=True))
    target.forward([Segment(kv_cache, tokens[:-new], 0) for kv_cache, tokens in pairs])
    segments = [Segment(kv_cache, tokens[-new:], new) for kv_cache, tokens in pairs]
    positions = list(chain(*(range(len(tokens) - new, len(tokens)) for tokens in sequences)))
    passes: list[float] = []
    coupled: list[float] = []
    greedy: list[float] = []
    for _ in range(_REPEATS):
        began = perf_counter()
        logits = target.forward(segments)
        passes.append(perf_counter() - began)
        for kv_cache, tokens in pairs:
            kv_cache.rollback(len(tokens) - new)
        for sampling, seconds in ((SAMPLED, coupled), (GREEDY, greedy)):
            rows = [SamplingRow(sampling, position) for position in positions]
            seconds.append(_seconds(lambda: sample_target_tokens(logits, rows)))  # noqa: B023 - called at once
    name = f"forward pass of {len(sequences)} sessions × {new} tokens"
    return [
        _row("coupled: sample the target's tokens", median(coupled), name, median(passes)),
        _row("of which the noise", median(coupled) - median(greedy), name, median(passes)),
    ]


def _time_tokens(model: SequenceModel, prompt: list[int], count: int, times: _DeviceTimes) -> list[int]:
    """Draft ``count`` tokens one by one; returns the prompt with them."""
    tokens = list(prompt)
    model.rollback(0)
    logits = model.forward(tokens)
    for _ in range(count):
        times.coupled.append(_seconds(lambda: coupled_token(logits, SAMPLED, len(tokens))))  # noqa: B023
        times.greedy.append(_seconds(lambda: coupled_token(logits, GREEDY, len(tokens))))  # noqa: B023
        tokens.append(coupled_token(logits, SAMPLED, len(tokens))[0])
        began = perf_counter()
        logits = model.forward(tokens[-1:])
        times.draft.append(perf_counter() - began)
    return tokens


def _time_round(model: SequenceModel, tokens: list[int], codec: FrameCodec, times: _DeviceTimes) -> None:
    """Draft a round in mode ``topk``, and encode and decode its Draft."""
    drafter = Drafter(model, Mode.TOPK, SAMPLED, UplinkSettings.of_mode(Mode.TOPK, UPLINK_K, 1.0, 0))
    drafter.prefill(tokens)
    began = perf_counter()
    drafted = drafter.draft(tokens, DRAFT_LEN)
    times.round.append(perf_counter() - began)
    draft = Draft(0, 1, drafted.token_ids, drafted.distributions)
    times.codec.append(_seconds(lambda: codec.decode(codec.encode(draft))))


def _row(case: str, seconds: float, compared_with: str, compared_seconds: float) -> Row:
    return {
        "case": case,
        "milliseconds": seconds * 1e3,
        "compared_with": compared_with,
        "compared_milliseconds": compared_seconds * 1e3,
        "share": seconds / compared_seconds,
    }


def _seconds(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began
