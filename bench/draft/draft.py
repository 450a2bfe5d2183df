"""The speed of drafting, against other libraries and against the memory bandwidth."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Annotated

import typer

from bench.draft.bandwidth import MemoryReader, weight_bytes
from bench.draft.loop_process import LoopProcess
from bench.draft.loops import LOOPS, Decoded, obstacle
from bench.draft.models import Models, linked_models
from bench.setup.options import BundleOption, CountOption, JsonOption, PromptsOption, console, progress_bar
from bench.setup.prompts import read_prompts
from bench.setup.results import Results, Row
from device.text.tokenizer import Tokenizer
from protocol.bundle import MODEL_NAME, Manifest

OWN = "edgedraft"
FIGURES = (
    "milliseconds",
    "spread",
    "cpu_milliseconds",
    "edgedraft_speedup",
    "numpy_share",
    "bandwidth_share",
    "same_answers",
)
"""Of a token: median and range over median, CPU time, time relative to edgedraft's, share outside ONNX Runtime."""


def draft(
    bundle: BundleOption,
    target: Annotated[
        str, typer.Option(help="Model that the bundle was converted from: a folder, a hub name or a .gguf file.")
    ],
    prompts: PromptsOption = None,
    count: CountOption = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after each prompt.")] = 64,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="Threads of a loop; repeatable. Default: 1 and 2.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Compare the speed of drafting with other libraries and with the memory bandwidth."""
    manifest = Manifest.read(bundle)
    tokenizer = Tokenizer(bundle, manifest)
    texts = read_prompts(prompts, count)
    prompt_ids = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    numbers = threads or [1, 2]
    rows: list[Row] = []
    with linked_models(bundle, target) as models, progress_bar() as progress:
        task = progress.add_task("prompts", total=len(numbers) * count)
        for number in numbers:
            rows += thread_rows(models, prompt_ids, tokens, number, lambda: progress.advance(task))
    settings: Row = {"draft": manifest.name, "precision": manifest.precision, "prompts": count, "tokens": tokens}
    measured = Results(settings, rows)
    measured.show(console)
    measured.write(json_file)


def thread_rows(
    models: Models, prompts: Sequence[list[int]], tokens: int, threads: int, advance: Callable[[], object]
) -> list[Row]:
    """A row per case; the cases take turns on every prompt, forwards and backwards."""
    obstacles = {case: obstacle(case, models.target) for case in LOOPS}
    processes = {case: LoopProcess(case, models, threads) for case in LOOPS if obstacles[case] is None}
    decoded: dict[str, list[Decoded]] = {case: [] for case in LOOPS}
    memory, bandwidths = MemoryReader(), []
    for process in processes.values():
        process.decode(prompts[0], tokens)  # warm up
    for index, prompt in enumerate(prompts):
        for case in list(processes)[:: -1 if index % 2 else 1]:
            decoded[case].append(processes[case].decode(prompt, tokens))
        bandwidths.append(memory.bandwidth(threads))
        advance()
    limit = weight_bytes(models.bundle / MODEL_NAME) / max(bandwidths)
    peaks = {case: process.close() for case, process in processes.items()}
    return [
        {"case": case, "threads": threads, **_figures(decoded[case], decoded[OWN], limit)}
        | {"peak_memory_bytes": peaks.get(case), "missing": obstacles[case]}
        for case in LOOPS
    ]


def _figures(decoded: Sequence[Decoded], own: Sequence[Decoded], limit: float) -> Row:
    """Medians over the prompts; ``limit`` is the seconds in which the weights of a token can be read."""
    if not decoded:
        return dict.fromkeys(FIGURES)
    seconds = [one.seconds / (len(one.token_ids) - 1) for one in decoded]
    shares = [1 - one.engine_seconds / one.seconds for one in decoded if one.engine_seconds is not None]
    pairs = list(zip(decoded, own, strict=True))
    values = (
        median(seconds) * 1e3,
        (max(seconds) - min(seconds)) / median(seconds),
        median(one.cpu_seconds / (len(one.token_ids) - 1) for one in decoded) * 1e3,
        median(one.seconds / ours.seconds for one, ours in pairs),
        median(shares) if shares else None,
        limit / median(seconds),
        sum(one.token_ids == ours.token_ids for one, ours in pairs),
    )
    return dict(zip(FIGURES, values, strict=True))
