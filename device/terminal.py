"""What the terminal shows of an answer: its text as it is committed, then a line of figures."""

import sys

import typer
from rich.console import Console
from rich.text import Text

from device.answers.answer import Answer, TextChunk
from device.session.session import Origin

ORIGIN_STYLES = {
    Origin.ACCEPTED: "green",
    Origin.RECOVERED: "bold red",
    Origin.BONUS: "bold blue",
    Origin.TARGET: "bold magenta",
    Origin.LOOKUP: "cyan",
}

console = Console(highlight=False, soft_wrap=True)


def show(chunk: TextChunk, origins: bool) -> None:
    """Print the text of a token, in the color of its origin if wanted."""
    console.print(Text(chunk.text, style=ORIGIN_STYLES[chunk.origin] if origins else ""), end="")


def show_figures(answer: Answer) -> None:
    """Print speed, acceptance rate and bytes of an answer on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        return
    acceptance = "" if answer.acceptance_rate is None else f", acceptance {answer.acceptance_rate:.2f}"
    typer.echo(
        f"{len(answer.token_ids)} tokens, {answer.tokens_per_second:.1f} tokens/s{acceptance}, "
        f"{answer.uplink_bytes} bytes up, {answer.downlink_bytes} down",
        err=True,
    )
