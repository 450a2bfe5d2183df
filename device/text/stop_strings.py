"""Stop strings: the text ends where one of them appears, however tokens divide it.

Of several in a text the one that starts first counts, and of those the longest.
"""

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
        found, partial = self._first_found(text), self._first_partial(text)
        if found is not None and (partial is None or found <= partial):
            return self._stop_at(text, found)
        end = len(text) if partial is None else partial
        self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """The text held back, once no more follows; it may hold a stop string behind the start of another."""
        found = self._first_found(self._held)
        if found is not None:
            return self._stop_at(self._held, found)
        text, self._held = self._held, ""
        return text

    def _stop_at(self, text: str, end: int) -> str:
        self.reached, self._held = True, ""
        return text[:end]

    def _first_found(self, text: str) -> int | None:
        """Where the first stop string starts."""
        return min((index for stop in self._stops if (index := text.find(stop)) >= 0), default=None)

    def _first_partial(self, text: str) -> int | None:
        """Where the text ends in the start of a stop string, the earliest such place."""
        longest = max((len(stop) for stop in self._stops), default=0)
        first = max(0, len(text) - longest + 1)
        return next(
            (start for start in range(first, len(text)) if any(stop.startswith(text[start:]) for stop in self._stops)),
            None,
        )
