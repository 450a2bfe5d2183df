"""The target's pace as the Welcome tells it, from the measured times of forward passes.

Knows counts and seconds; not what a session is.
"""

from dataclasses import dataclass

from common.estimates import Line, Ratio

_DECAY = 0.99
"""Weight that a pass keeps when the next one ends: about the last hundred count."""
_OUTLIER = 2.0
"""A pass counts at most as this many times its expected duration."""
_CERTAIN_PASSES = 4
"""Before this many passes, the expected duration is not known well enough to recognize an outlier."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The time of a forward pass that runs one token of another session, and what each further token adds.

    Both in seconds, 0 where nothing is measured.
    """

    pass_seconds: float = 0.0
    row_seconds: float = 0.0


class PassTimes:
    """A running regression line of the duration of passes over their tokens."""

    def __init__(self) -> None:
        self._seconds = Line(_DECAY)
        self._tokens = Ratio()  # tokens over sessions
        self._passes = 0

    def observe(self, sessions: int, tokens: int, seconds: float) -> None:
        """Record a pass that ran rounds alone, without prefill: its sessions, its tokens and its duration."""
        if self._passes >= _CERTAIN_PASSES:
            seconds = min(seconds, _OUTLIER * self._expected(tokens))
        self._seconds.observe(tokens, seconds)
        self._tokens.observe(tokens, sessions)
        self._passes += 1

    def pace(self, others: int) -> Pace:
        """The pace for one more session beside ``others`` that are active now."""
        if not self._passes:
            return Pace()
        return Pace(self._expected(1 + others * self._tokens.value), self._seconds.slope)

    def _expected(self, tokens: float) -> float:
        return self._seconds.intercept + tokens * self._seconds.slope
