"""What a terminal shows of the text and the control sequences that a program writes."""

import io
import re

from rich.console import Console

ASCII_OUTPUTS = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
]
"""Environments in which stdout takes ASCII alone."""
CONSOLE = Console(file=io.StringIO())
"""That nobody sees."""

_SEQUENCE = re.compile(r"\x1b\[([\d;]*)([A-Za-z])")


class Screen:
    """A terminal whose lines are never out of sight; each cell has a character, which may be struck through."""

    def __init__(self, width: int, written: str) -> None:
        self._width = width
        self._cells: dict[tuple[int, int], tuple[str, bool]] = {}
        self._line = self._column = 0
        self._is_struck = False
        position = 0
        for match in _SEQUENCE.finditer(written):
            self._put(written[position : match.start()])
            self._control(match[1], match[2])
            position = match.end()
        self._put(written[position:])

    def text(self, struck: bool = False) -> str:
        """The characters that are struck through, or those that are not."""
        places = sorted(place for place, (_, is_struck) in self._cells.items() if is_struck is struck)
        return "".join(self._cells[place][0] for place in places)

    def _put(self, text: str) -> None:
        for character in text:
            if character == "\n":
                self._line, self._column = self._line + 1, 0
                continue
            if self._column == self._width:
                self._line, self._column = self._line + 1, 0
            self._cells[self._line, self._column] = character, self._is_struck
            self._column += 1

    def _control(self, numbers: str, kind: str) -> None:
        if kind == "A":
            self._line -= int(numbers or 1)
        elif kind == "G":
            self._column = int(numbers) - 1
        else:
            assert kind == "m"
            self._is_struck = "9" in numbers.split(";")
