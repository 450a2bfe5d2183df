"""What the terminal shows of an answer: its text as it is committed, then a line of figures."""

import sys

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from device.answers.answer import Answer, TextChunk
from device.session.session import Origin
from device.text.tentative_text import TentativeText

ORIGIN_STYLES = {
    Origin.ACCEPTED: "green",
    Origin.RECOVERED: "bold red",
    Origin.BONUS: "bold blue",
    Origin.TARGET: "bold magenta",
    Origin.LOOKUP: "cyan",
    Origin.UNVERIFIED: "yellow",
}
_REPLACED_STYLE = "yellow strike"

console = Console(highlight=False, soft_wrap=True)


class AnswerDisplay:
    """The text of an answer on the console.

    On a terminal unverified text is shown at once, in its color; text that the base station rejects is struck through,
    and what replaces it follows. Elsewhere text is printed once it is verified, or the answer has ended.

    Args:
        origins: whether all tokens have the color of their origin.
        quiet: whether nothing is shown.
    """

    def __init__(self, origins: bool, quiet: bool = False) -> None:
        self._origins = origins
        self._quiet = quiet
        self._text = TentativeText()
        self._column = 0  # where the unverified text begins

    @property
    def unverified(self) -> str:
        """The unverified text that is shown."""
        return self._text.unverified

    def show(self, chunk: TextChunk) -> None:
        """Print the text of a token, and the unverified text that follows it."""
        if chunk.token is None and chunk.origin is Origin.UNVERIFIED:
            self._revise("", chunk.text)
        else:
            unverified = chunk.unverified if console.is_terminal else ""
            self._revise(chunk.text, unverified, ORIGIN_STYLES[chunk.origin] if self._origins else "")

    def show_unverified(self, chunk: TextChunk) -> bool:
        """Print the unverified text; False, as it does not end the answer."""
        if console.is_terminal:
            self._revise("", chunk.unverified)
        return False

    def _revise(self, verified: str, unverified: str, style: str = "") -> None:
        if self._quiet:
            return
        before = self._text.unverified
        revision = self._text.revise(verified, unverified)
        kept = before.removesuffix(revision.replaced)
        if revision.replaced:
            self._strike(_column_after(self._column, kept), revision.replaced)
        start = _column_after(self._column, before) if revision.verified else self._column
        self._column = _column_after(start, revision.text[: revision.verified] or verified)
        self._print(revision.text[: revision.verified], style)
        self._print(revision.text[revision.verified :], ORIGIN_STYLES[Origin.UNVERIFIED])

    def _strike(self, column: int, replaced: str) -> None:
        """Print the text before the cursor, which begins at ``column``, again and struck through."""
        while (lines := _end_of(column, replaced)[0]) >= console.height:  # its first lines are out of sight
            column, replaced = _column_after(column, replaced[0]), replaced[1:]
        moves = [(ControlType.CURSOR_UP, lines)] if lines else []
        console.control(Control(*moves, (ControlType.CURSOR_MOVE_TO_COLUMN, column)))
        self._print(replaced, _REPLACED_STYLE)

    def _print(self, text: str, style: str) -> None:
        console.print(Text(text, style=style), end="")


def _end_of(column: int, text: str) -> tuple[int, int]:
    """How many lines below its start a text ends that begins at ``column``, and at which column."""
    line, width = 0, console.width
    for character in text:
        cells = cell_len(character)
        if character == "\n":
            line, column = line + 1, 0
        elif column + cells > width:
            line, column = line + 1, cells
        else:
            column += cells
    return line, column


def _column_after(column: int, text: str) -> int:
    return _end_of(column, text)[1]


def show_figures(answer: Answer) -> None:
    """Print speed, acceptance rate and bytes of an answer on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        return
    acceptance = "" if answer.acceptance_rate is None else f", acceptance {answer.acceptance_rate:.2f}"
    unverified = f", the last {answer.unverified} unverified" if answer.unverified else ""
    typer.echo(
        f"{len(answer.token_ids)} tokens{unverified}, {answer.tokens_per_second:.1f} tokens/s{acceptance}, "
        f"{answer.uplink_bytes} bytes up, {answer.downlink_bytes} down",
        err=True,
    )
