"""Whether the target decodes alone, and when the other way is tried again.

Knows the speeds of both ways; not how they are estimated.
"""

from dataclasses import dataclass
from math import sqrt

MIN_WAIT = 64
"""Tokens at least until the slower way is tried again."""
TRIAL = 3
"""Tokens of a trial of the target alone: two intervals."""
TRIAL_SHARE = 1 / 50
"""Largest share of all time that trials of drafting may cost."""
_GUESSED_TRIAL_SHARE = 1 / 100
"""The same where guesses tell the acceptance, so that a trial tells the times alone; less the slower drafting is."""
_TARGET_TRIAL_SHARE = 1 / 100
"""The same for trials of the target alone, which run where drafting is faster, usually by far."""
_LEAST_SPEEDUP = 0.85
"""Where guesses tell the acceptance, drafting goes on down to this: a hard passage is short, and to switch costs time.

Margins also make rounds better than predicted.
"""
_CERTAIN_ROUNDS = 32
"""Before this many rounds, drafting is given up only where it is clearly slower: n rounds have an error of 1/√n."""


@dataclass(frozen=True)
class Speeds:
    """What is known of both ways.

    Attributes:
        tokens_per_second: of drafting.
        speedup: of drafting over the target alone, above 0.
        drafting_is_slower: whether drafting cannot pay, whatever is accepted.
        rounds_seen: rounds that ``speedup`` rests on.
        guesses: whether guesses tell the acceptance while the target decodes alone.
        target_seconds: between two tokens of the target alone, above 0.
        reply_seconds: until the first of them.
        round_trip_seconds: of the link.
        predicted_round: tokens and seconds of a round.
    """

    tokens_per_second: float
    speedup: float
    drafting_is_slower: bool
    rounds_seen: int
    guesses: bool
    target_seconds: float
    reply_seconds: float
    round_trip_seconds: float
    predicted_round: tuple[float, float]


class Trials:
    """Two ways, drafting and the target alone: the faster one goes on, the slower one is tried now and then.

    Attributes:
        alone: whether the target decodes alone.
        since: tokens since the slower way was last tried.
        wait: tokens after which it is tried again.
    """

    def __init__(self) -> None:
        self.start(alone=False, since=0, wait=MIN_WAIT)

    def start(self, alone: bool, since: int, wait: int) -> None:
        """Go on in this way, as an earlier process did."""
        self.alone, self.since, self.wait = alone, since, wait

    @property
    def due(self) -> bool:
        """Whether the slower way is to be tried now."""
        return self.since >= self.wait

    @property
    def left(self) -> int:
        """Tokens until then."""
        return self.wait - self.since

    def review(self, speeds: Speeds, was_alone: bool, tokens: int, seconds: float) -> None:
        """Choose how to go on.

        Args:
            speeds: as estimated now.
            was_alone: whether the last tokens were decoded by the target alone.
            tokens: how many they were.
            seconds: the time that they took.
        """
        self.since += tokens
        if self._drafting_pays(speeds) is self.alone:
            self.start(not self.alone, since=0, wait=MIN_WAIT)
            if speeds.guesses:
                self._plan(speeds, *self._expected(speeds))
        elif was_alone is not self.alone:
            self._plan(speeds, tokens, seconds)

    def _drafting_pays(self, speeds: Speeds) -> bool:
        """Whether drafting is to go on, or to be taken up again."""
        if speeds.drafting_is_slower:
            return False
        if self.alone:
            needed = 1.0
        elif speeds.guesses:
            needed = _LEAST_SPEEDUP
        else:
            needed = min(1.0, sqrt(speeds.rounds_seen / _CERTAIN_ROUNDS))
        return speeds.speedup >= needed

    def _plan(self, speeds: Speeds, tokens: float, seconds: float) -> None:
        """Plan the next trial: the last one gave ``tokens`` in ``seconds``, or the next one will.

        It loses what the faster way gives in that time, less its own tokens.
        """
        if not self.alone:
            rate, share = speeds.tokens_per_second, _TARGET_TRIAL_SHARE
        elif speeds.guesses:
            rate, share = 1 / speeds.target_seconds, _GUESSED_TRIAL_SHARE * min(1.0, speeds.speedup)
            seconds += speeds.round_trip_seconds  # to go back
        else:
            rate, share = 1 / speeds.target_seconds, TRIAL_SHARE
        self.since, self.wait = 0, max(MIN_WAIT, round((seconds * rate - tokens) / share))

    def _expected(self, speeds: Speeds) -> tuple[float, float]:
        """Tokens and seconds of a trial of the slower way."""
        if self.alone:
            return speeds.predicted_round
        return TRIAL, speeds.reply_seconds + (TRIAL - 1) * speeds.target_seconds
