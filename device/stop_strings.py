"""Text that ends an answer where it appears, however tokens cut it."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first of ``stops``; holds back what may be the beginning of one.

    Attributes:
        reached: whether one of them has appeared; no text comes after that.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.reached = False
        self._stops = stops
        self._held = ""

    def pass_on(self, text: str) -> str:
        """What is certain not to belong to a stop string, now that ``text`` follows."""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.reached = True
        end = min(places) if places else len(text) - self._beginning(text)
        self._held = "" if places else text[end:]
        return text[:end]

    def rest(self) -> str:
        """What was held back, once no more text follows."""
        text, self._held = self._held, ""
        return text

    def _beginning(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        lengths = (length for stop in self._stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
        return max(lengths, default=0)
