"""What a shared prefix costs in a forward pass, and what it saves in prefill and memory."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Annotated

import torch
import typer

from basestation.target.segment import Segment
from basestation.target.target_model import TargetModel
from bench.setup.options import (
    BatchSessionsOption,
    DraftLenOption,
    DtypeOption,
    JsonOption,
    TargetOption,
    TorchDeviceOption,
    console,
    progress_bar,
)
from bench.setup.results import Results, Row
from bench.station.passes import PackedPassRunner, seconds_of
from protocol.errors import SettingsError

_REPEATS = 25
_CHUNK = 256


def prefixes(
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    torch_device: TorchDeviceOption = "auto",
    sessions: BatchSessionsOption = 16,
    context: Annotated[int, typer.Option(help="Context length of each session.", min=2)] = 350,
    shared: Annotated[int, typer.Option(help="Tokens of the shared prefix.", min=1)] = 256,
    draft_len: DraftLenOption = 4,
    json_file: JsonOption = None,
) -> None:
    """Measure what a shared prefix costs in a forward pass, and what it saves."""
    target_model = TargetModel.load(target, dtype, torch_device)
    with progress_bar() as progress:
        task = progress.add_task("measurements", total=None)
        rows = measure_prefixes(target_model, sessions, context, shared, draft_len + 1, lambda: progress.advance(task))
    measured = Results({"target": target_model.name, "dtype": dtype, "context": context, "draft_len": draft_len}, rows)
    measured.show(console)
    measured.write(json_file)


def measure_prefixes(
    target: TargetModel, sessions: int, context: int, shared: int, new: int, advance: Callable[[], object]
) -> list[Row]:
    """Rows of forward passes and prefills, each with and without a shared prefix.

    Args:
        target: of the base station.
        sessions: in a forward pass.
        context: tokens of each session before the new ones.
        shared: tokens of the shared prefix.
        new: tokens of each session in a forward pass.
        advance: called after each measurement.

    Raises:
        SettingsError: ``shared`` is not a multiple of the page size, or not below the context.
    """
    page_size = target.kv_pool.page_size
    if shared % page_size or not 0 < shared < context:
        raise SettingsError("shared", shared, f"a multiple of {page_size} below the context of {context}")
    generator = torch.Generator().manual_seed(0)
    prefix, *suffixes = (
        torch.randint(target.vocabulary.size, (length,), generator=generator).tolist()
        for length in (shared, *[context - shared + new] * sessions)
    )
    sequences = [[*prefix, *suffix] for suffix in suffixes]
    rows = []
    for case, figures in _pass_figures(target, sequences, new, shared, advance).items():
        rows.append({"case": f"pass, {case}", "sessions": sessions, **figures})
    for case, seconds in _prefill_seconds(target, sequences[0][:context], shared, advance).items():
        rows.append({"case": f"prefill, {case}", "sessions": 1, "milliseconds": 1e3 * seconds, "kv_positions": None})
    return rows


def _pass_figures(
    target: TargetModel, sequences: Sequence[list[int]], new: int, shared: int, advance: Callable[[], object]
) -> dict[str, Row]:
    passes: dict[str, PackedPassRunner] = {}
    positions: dict[str, int] = {}
    seconds: dict[str, list[float]] = {"no prefix shared": [], f"{shared} tokens shared": []}
    for case, length in zip(seconds, (0, shared), strict=True):
        before = target.kv_pool.used
        passes[case] = PackedPassRunner(target, sequences, new, length)
        passes[case].run()
        positions[case] = target.kv_pool.used - before
        advance()
    for _ in range(_REPEATS):
        for case, packed in passes.items():
            seconds[case].append(seconds_of(packed.run, target.torch_device))
    for packed in passes.values():
        packed.release()
    return {
        case: {"milliseconds": 1e3 * median(times), "kv_positions": positions[case]} for case, times in seconds.items()
    }


def _prefill_seconds(
    target: TargetModel, tokens: list[int], shared: int, advance: Callable[[], object]
) -> dict[str, float]:
    """Prefill time of a new session: of all its tokens, or of those after a prefix that another session has cached."""
    source, new_session = target.new_kv_cache(), target.new_kv_cache()

    def prefill(start: int) -> None:
        new_session.release()
        new_session.share_prefix(source, start)
        for index in range(start, len(tokens), _CHUNK):
            target.forward([Segment(new_session, tokens[index : index + _CHUNK], 0)])

    target.forward([Segment(source, tokens, 0)])
    seconds: dict[str, list[float]] = {"no prefix shared": [], f"{shared} tokens shared": []}
    for _ in range(_REPEATS // 3):
        for times, start in zip(seconds.values(), (0, shared), strict=True):
            times.append(seconds_of(lambda: prefill(start), target.torch_device))  # noqa: B023 - called at once
        advance()
    for kv_cache in (source, new_session):
        kv_cache.release()
    return {case: median(times[1:]) for case, times in seconds.items()}
