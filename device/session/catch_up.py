"""Catching up: the draft model runs tokens that it has not run yet, in chunks while the device waits."""

from collections.abc import Callable, Sequence

from device.drafting.drafter import Drafter
from device.planning.planner import Planner

_MIN_PREFILL, _MAX_PREFILL = 8, 16
"""While the device waits, the draft model runs the new tokens in chunks of this size.

A single token costs more, and more tokens would keep those of the target waiting.
"""


class CatchUp:
    """The backlog of the draft model of one session.

    Args:
        drafter: of the session.
        clock: seconds, monotonic.
    """

    def __init__(self, drafter: Drafter, clock: Callable[[], float]) -> None:
        self._drafter = drafter
        self._clock = clock

    def chunk_len(self, tokens: Sequence[int]) -> int:
        """Tokens of the next chunk; 0 where the draft model has nothing to catch up on, or no room for a draft."""
        backlog = self._drafter.backlog(tokens) if self._drafter.room(tokens) else 0
        return min(backlog, _MAX_PREFILL) if backlog >= _MIN_PREFILL else 0

    def run_chunk(self, tokens: Sequence[int], planner: Planner) -> bool:
        """Run the next chunk of ``tokens``; whether there was one."""
        count = self.chunk_len(tokens)
        if count:
            self._run(tokens, count, planner)
        return count > 0

    def run_all(self, tokens: Sequence[int], planner: Planner) -> None:
        """Run all of ``tokens`` at once, where they are enough for a chunk; drafting runs fewer itself."""
        if (backlog := self._drafter.backlog(tokens)) >= _MIN_PREFILL:
            self._run(tokens, backlog, planner)

    def _run(self, tokens: Sequence[int], count: int, planner: Planner) -> None:
        began = self._clock()
        self._drafter.prefill(tokens, count)
        planner.observe_prefill(count, self._clock() - began)
