"""The text of an answer on its way to its client: up to a stop string, and without the calls of tools in it."""

from collections.abc import Callable, Sequence
from copy import copy, deepcopy

from device.text.stop_strings import StopStrings
from device.text.tool_calls import ToolCall, ToolCallParser


class AnswerText:
    """Passes the text of one answer on.

    Args:
        stops: texts that end the answer.
        parser: of the calls in it; None where it may have none.
        deliver: receives calls.
        parallel: whether several calls may come; if not, the first one ends the answer.

    Attributes:
        called: whether a call was delivered.
    """

    def __init__(
        self,
        stops: Sequence[str],
        parser: ToolCallParser | None,
        deliver: Callable[[ToolCall], None],
        parallel: bool = True,
    ) -> None:
        self._stops = StopStrings(stops)
        self._parser = parser
        self._deliver = deliver
        self._parallel = parallel
        self.called = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared, or the only call; no text follows."""
        return self._stops.reached or (self.called and not self._parallel)

    def feed(self, text: str) -> str:
        """Add ``text``; return what may be shown now."""
        text = self._stops.feed(text)
        return self._without_calls(self._parser.feed(text)) if self._parser else text

    def preview(self, text: str) -> tuple[str, bool]:
        """What would be shown if ``text`` came next, without its calls, and whether the answer would end in it."""
        if self.stopped:
            return "", True
        ahead = copy(self)
        ahead._stops, ahead._parser = copy(self._stops), deepcopy(self._parser)
        ahead._deliver = lambda _: None
        return ahead.feed(text), ahead.stopped

    def flush(self) -> str:
        """What was held back, once no more follows."""
        text = self._stops.flush()
        return self._without_calls([*self._parser.feed(text), *self._parser.flush()]) if self._parser else text

    def _without_calls(self, parts: Sequence[str | ToolCall]) -> str:
        text = ""
        for part in parts:
            if self.called and not self._parallel:
                break
            if isinstance(part, ToolCall):
                self.called = True
                self._deliver(part)
            else:
                text += part
        return text
