"""Guesses: what the draft model would draft while the target decodes alone.

They send nothing, and teach the planner how often drafted tokens are accepted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from device.drafting.drafter import DraftedToken, Drafter
from device.planning.planner import Planner


@dataclass(frozen=True)
class _Guess:
    """A guess of the token at ``position``; ``seconds`` is None where more than one token was run for it."""

    position: int
    token: DraftedToken
    seconds: float | None


class Guesses:
    """The guesses of one session.

    Args:
        drafter: of the session.
        clock: seconds, monotonic.
    """

    def __init__(self, drafter: Drafter, clock: Callable[[], float]) -> None:
        self._drafter = drafter
        self._clock = clock
        self._last: _Guess | None = None

    def next(self, tokens: Sequence[int], planner: Planner) -> bool:
        """Guess what follows the committed ``tokens``, once; whether there was something to do."""
        self.check(tokens, planner)
        if self._last or not self._drafter.room(tokens):
            return False
        one_pass = not self._drafter.backlog(tokens)
        began = self._clock()
        self._drafter.follow(tokens)
        token = self._drafter.guess_token()
        self._last = _Guess(len(tokens), token, self._clock() - began if one_pass else None)
        return True

    def check(self, tokens: Sequence[int], planner: Planner) -> None:
        """Tell the planner whether the last guess was right, once the token at its position is committed."""
        guess = self._last
        if guess is None or guess.position >= len(tokens):
            return
        planner.observe_guess(guess.token.margin, guess.token.token_id == tokens[guess.position], guess.seconds)
        self._last = None
