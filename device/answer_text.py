"""The text of an answer on its way to its client: up to a stop string, and without the calls of tools in it."""

from collections.abc import Callable, Sequence

from device.stop_strings import StopStrings
from device.tool_calls import ToolCall, ToolFormat


class AnswerText:
    """Passes the text of one answer on.

    Args:
        stops: texts that end the answer.
        tool_format: of the calls in it; None where it may have none.
        deliver: receives calls.

    Attributes:
        called: whether a call was delivered.
    """

    def __init__(
        self, stops: Sequence[str], tool_format: ToolFormat | None, deliver: Callable[[ToolCall], None]
    ) -> None:
        self._stops = StopStrings(stops)
        self._parser = tool_format.parser() if tool_format else None
        self._deliver = deliver
        self.called = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared; no text follows."""
        return self._stops.reached

    def feed(self, text: str) -> str:
        """Add ``text``; return what may be shown now."""
        text = self._stops.feed(text)
        return self._without_calls(self._parser.feed(text)) if self._parser else text

    def flush(self) -> str:
        """What was held back, once no more follows."""
        text = self._stops.flush()
        return self._without_calls([*self._parser.feed(text), *self._parser.flush()]) if self._parser else text

    def _without_calls(self, parts: Sequence[str | ToolCall]) -> str:
        for part in parts:
            if isinstance(part, ToolCall):
                self.called = True
                self._deliver(part)
        return "".join(part for part in parts if isinstance(part, str))
