"""Catching up: the draft model runs tokens that it has not run yet, in chunks while the device waits."""

from collections.abc import Callable, Sequence

from device.drafting.drafter import Drafter
from device.planning.planner import Planner

_MIN_CHUNK = 8
"""Fewer tokens are left to drafting: a single token of a chunk costs as much as a drafted one."""
_CHUNK, _LONGEST_CHUNK = 16, 64
"""Tokens that are run at once while the device waits.

Longer chunks cost less a token, but keep tokens of the target waiting. So a chunk of a long prompt has an eighth of
what is left, within these bounds.
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
        chunk = min(max(_CHUNK, backlog // 8), _LONGEST_CHUNK)
        return min(backlog, chunk) if backlog >= _MIN_CHUNK else 0

    def run_chunk(self, tokens: Sequence[int], planner: Planner) -> bool:
        """Run the next chunk of ``tokens``; whether there was one."""
        count = self.chunk_len(tokens)
        if count:
            self._run(tokens, count, planner)
        return count > 0

    def run_all(self, tokens: Sequence[int], planner: Planner) -> None:
        """Run all of ``tokens`` at once, where they are enough for a chunk; drafting runs fewer itself."""
        if (backlog := self._drafter.backlog(tokens)) >= _MIN_CHUNK:
            self._run(tokens, backlog, planner)

    def _run(self, tokens: Sequence[int], count: int, planner: Planner) -> None:
        began = self._clock()
        self._drafter.prefill(tokens, count)
        planner.observe_prefill(count, self._clock() - began)
