"""Stop strings: the text ends where one of them appears, however tokens divide it."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string; holds back what may be the start of one.

    Attributes:
        reached: whether a stop string has appeared; no text follows.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.reached = False
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> str:
        """Add ``text``; return what cannot belong to a stop string."""
        text = self._held + text
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self.reached = True
        end = min(found) if found else len(text) - self._partial_len(text)
        self._held = "" if found else text[end:]
        return text[:end]

    def flush(self) -> str:
        """The text held back, once no more follows."""
        text, self._held = self._held, ""
        return text

    def _partial_len(self, text: str) -> int:
        """How many characters at the end may be the start of a stop string."""
        lengths = (length for stop in self._stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
        return max(lengths, default=0)
