"""The demonstration: an answer streamed in colour, then what drafting was worth."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.grid.speedup import WARM_UP_TOKENS, full_vocabulary_bytes
from bench.setup.bench_setup import BenchSetup
from device.answer import Answer
from device.cli import ORIGIN_STYLES
from device.session import DraftSettings
from protocol.messages import Mode, Sampling

PROMPT = "Explain in a few sentences why a small and a large language model work well together."
MAX_NEW_TOKENS = 128


def show_demo(place: BenchSetup, console: Console) -> None:
    """Stream one answer, repeat it with the target alone, and print both in a table."""
    alone = DraftSettings(Mode.TARGET, Sampling(), 1, None)
    together = DraftSettings(Mode.IDS, Sampling(), 1, None)
    prompt_ids = place.prompt_ids(PROMPT)
    place.answer(prompt_ids, WARM_UP_TOKENS, together)  # first passes are slow
    console.print(f"[bold]{PROMPT}[/bold]\n")
    drafted = _stream(place, prompt_ids, together, console)
    console.print(_legend())
    baseline = place.answer(prompt_ids, MAX_NEW_TOKENS, alone)
    console.print(_table(drafted, baseline, full_vocabulary_bytes(place.model.manifest.vocab_size)))
    same = "the same tokens" if drafted.token_ids == baseline.token_ids else "other tokens (bfloat16 rounds by batch)"
    console.print(f"The target alone gives {same}.")


def _stream(place: BenchSetup, prompt_ids: list[int], settings: DraftSettings, console: Console) -> Answer:
    conversation = place.conversation(settings)
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
    table.add_row("tokens a second", f"{speeds[0]:.1f}  ({speeds[0] / speeds[1]:.2f}×)", f"{speeds[1]:.1f}")
    table.add_row("acceptance rate", f"{drafted.acceptance_rate or 0:.2f}", "–")
    table.add_row("tokens per round", f"{drafted.tokens_per_round:.2f}", f"{baseline.tokens_per_round:.2f}")
    uplink = [answer.uplink_bytes / len(answer.token_ids) for answer in (drafted, baseline)]
    table.add_row("uplink bytes per token, prompt included", f"{uplink[0]:.1f}", f"{uplink[1]:.1f}")
    table.add_row("… sending the full vocabulary instead", f"{full_vocabulary:,}", "–")
    return table
