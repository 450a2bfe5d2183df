"""The demonstration: an answer streamed in colour, then a comparison with the target alone."""

from contextlib import ExitStack
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.grid.speedup import WARM_UP_TOKENS
from bench.setup.bench_setup import BenchSetup, bench_setup
from bench.setup.options import BundleOption, DtypeOption, TargetOption, console
from bench.setup.station_process import running_station
from device.answers.answer import Answer
from device.settings import DraftSettings
from device.terminal import ORIGIN_STYLES
from protocol.messages import Mode, Sampling

PROMPT = "Explain in a few sentences why a small and a large language model work well together."
MAX_NEW_TOKENS = 128


def demo(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    prompt: Annotated[str, typer.Option(help="The user's message.")] = PROMPT,
) -> None:
    """Stream an answer in colour, then show the speedup over the target alone."""
    with ExitStack() as stack:
        with console.status("starting a base station"):
            setup = stack.enter_context(bench_setup(bundle, stack.enter_context(running_station(target, dtype))))
        show_demo(setup, prompt, console)
    console.print("next: edgedraft-device chat, or edgedraft-bench speedup (docs/benchmarks.md)")


def show_demo(setup: BenchSetup, prompt: str, console: Console) -> None:
    """Stream one answer, repeat it with the target alone, and compare the two in a table."""
    target_alone = DraftSettings(Mode.TARGET, Sampling(), 1, None)
    drafting = DraftSettings(Mode.IDS, Sampling(), 1, None)
    prompt_ids = setup.prompt_ids(prompt)
    setup.answer(prompt_ids, WARM_UP_TOKENS, drafting)  # the first forward passes are slow
    console.print(Text(prompt, style="bold"), end="\n\n")
    drafted = _stream(setup, prompt_ids, drafting, console)
    console.print(_legend())
    baseline = setup.answer(prompt_ids, MAX_NEW_TOKENS, target_alone)
    console.print(_table(drafted, baseline, full_vocabulary_bytes(setup.model.manifest.vocab_size)))
    same = drafted.token_ids == baseline.token_ids
    result = "the same tokens" if same else "different tokens (bfloat16 rounding depends on the batch)"
    console.print(f"The target alone generates {result}.")


def full_vocabulary_bytes(vocab_size: int) -> int:
    """Uplink bytes of one drafted token whose full distribution is sent in FP16."""
    return 2 * vocab_size


def _stream(setup: BenchSetup, prompt_ids: list[int], settings: DraftSettings, console: Console) -> Answer:
    conversation = setup.conversation(settings)
    stream = conversation.ask(prompt_ids, MAX_NEW_TOKENS)
    for piece in stream:
        console.print(Text(piece.text, style=ORIGIN_STYLES[piece.origin]), end="")
    conversation.close()
    return stream.answer


def _legend() -> Text:
    styled = ((str(origin), style) for origin, style in ORIGIN_STYLES.items())
    return Text("\n\n").append(Text(" · ").join(Text(name, style) for name, style in styled))


def _table(drafted: Answer, baseline: Answer, full_vocabulary: int) -> Table:
    table = Table("", "with drafting", "target alone")
    speeds = (drafted.tokens_per_second, baseline.tokens_per_second)
    table.add_row("tokens per second", f"{speeds[0]:.1f}  ({speeds[0] / speeds[1]:.2f}×)", f"{speeds[1]:.1f}")
    table.add_row("acceptance rate", f"{drafted.acceptance_rate or 0:.2f}", "–")
    table.add_row("tokens per round", f"{drafted.tokens_per_round:.2f}", f"{baseline.tokens_per_round:.2f}")
    uplink = [answer.uplink_bytes / len(answer.token_ids) for answer in (drafted, baseline)]
    table.add_row("uplink bytes per token, including the prompt", f"{uplink[0]:.1f}", f"{uplink[1]:.1f}")
    table.add_row("… if the full vocabulary were sent", f"{full_vocabulary:,}", "–")
    return table
