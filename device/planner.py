"""How many tokens to draft next, and whether to draft at all: a plan that follows what is measured.

Knows numbers, not models or links; the formulas stand in ``planner.py``.
"""

from bisect import bisect
from collections.abc import Sequence
from math import prod, sqrt

from device.estimates import Line, Ratio, Share
from device.round_model import RoundTimes, expected_tokens
from protocol.bundle import QualityFigures

MAX_DRAFT_LEN = 32
"""No plan drafts more: the formulas take acceptance to be the same at every position, which fails far out."""
ASSUMED_COST = 1 / 4
"""Time to draft a token over that of a pass of the target, before it is measured."""
FIRST_DRAFT_LEN = 4
"""The first round is short: nothing is known yet of the link's rate."""
TRIAL = 3
"""Tokens that the target decodes alone to show its pace: two intervals."""
SHORTEST_WAIT = 64
"""Tokens at least until the way that loses is tried again."""
TRIALS_SHARE = 1 / 30
"""Of all time, what trials of drafting may cost."""
_TARGET_TRIALS_SHARE = 1 / 100
"""The same of trials of the target alone, which are due where drafting is faster, mostly by far."""
_PRIOR_ROUNDS = 6.0
_CERTAIN_ROUNDS = 32
"""Before as many rounds, drafting is given up only where it is clearly slower: what n rounds tell is off by 1/√n."""
KEPT_ALONE = 0.5
"""What earlier rounds count for once the target has decoded ``SHORTEST_WAIT`` tokens alone."""
_INSTANT = 1e-9
_MARGINS = (0.15, 0.3, 0.5)
"""Between these margins, in units of the natural logarithm of a probability, tokens count as equally likely to stand."""
_CLOSE_CALLS = (0.6, 0.9)
"""At most so likely is a token with one of the smallest margins to stand, before any was seen."""


class Planner:
    """Says whether to draft, and after each drafted token whether another is worth its time.

    One more token adds the probability that it stands, and takes the time to
    draft it and to send and judge it. It is drafted where that gives at least
    the tokens a second of whole rounds: the rule that makes a ratio largest
    (Dinkelbach 1967). Where rounds give fewer tokens a second than the target
    alone, the target decodes alone (the adaptive rule of arXiv:2509.04576). The
    way that loses is tried again now and then.

    All figures are running estimates. How long a reply takes is a line over the
    tokens drafted: it begins at the link's round trip and a pass of the target,
    and rises by the time to send and judge a token, which only count together.
    Rounds begin as the model of ``planner.py`` foresees them.

    How likely a token stands is learnt from its *margin*: by how much its score
    exceeds the next one's, where the largest score is taken: in modes that send
    ids alone, and at temperature 0 in all. A close call is where two models
    differ. Tokens that are drawn have one probability for all.

    Args:
        quality: figures of the draft model; its likeness to the target is where estimates start.
        greedy: whether the target is sampled at temperature 0.
    """

    def __init__(self, quality: QualityFigures, greedy: bool) -> None:
        self._stands = Share(quality.argmax_agreement if greedy else quality.overlap)
        self._by_margin: dict[int, Share] = {}
        self._target_seconds: float | None = None
        self._link_seconds = 0.0
        self._replies = Line()
        self._drafting = Ratio()  # seconds over drafted tokens
        self._rounds = Ratio()  # tokens over seconds
        self._rounds_seen = 0
        self._foreseen = 0.0, 0.0
        self._alone = False
        self._since, self._wait = 0, SHORTEST_WAIT

    @property
    def alpha(self) -> float:
        """The probability that a drafted token is accepted, as estimated now."""
        return self._stands.mean()

    @property
    def times(self) -> RoundTimes:
        """Of a round, as estimated now; what a token adds to a reply counts as verifying."""
        target_seconds, slope = self._target_seconds or 0.0, self._replies.slope
        draft_seconds = self._drafting.value if self._drafting else ASSUMED_COST * target_seconds
        link_seconds = max(0.0, self._replies.intercept - target_seconds)
        return RoundTimes(draft_seconds, lambda draft_len: target_seconds + draft_len * slope, link_seconds)

    @property
    def speedup(self) -> float:
        """Tokens a second in rounds against ``SHORTEST_WAIT`` of the target alone, as estimated now.

        1 before both are known.
        """
        if self._target_seconds is None:
            return 1.0
        alone_seconds = self._target_seconds + self.times.round_trip_seconds / SHORTEST_WAIT
        return self._tokens_per_second() * alone_seconds

    def decode_len(self) -> int:
        """How many tokens the target is to decode alone now; 0 where drafting is due."""
        if self._target_seconds is None:
            return TRIAL
        tries_other = self._since >= self._wait
        if self._alone:
            return 0 if tries_other else self._wait - self._since
        return TRIAL if tries_other else 0

    def should_continue(self, margins: Sequence[float | None]) -> bool:
        """Whether to draft another token after those with the ``margins``, None where there is none to know."""
        if not margins:
            return True
        if len(margins) >= (MAX_DRAFT_LEN if self._rounds_seen else FIRST_DRAFT_LEN):
            return False
        stands = self.alpha * prod(map(self._acceptance, margins))
        times = self.times
        seconds = times.seconds(1) - times.seconds(0)
        return stands >= seconds * self._tokens_per_second()

    def observe_opened(self, seconds: float) -> None:
        """Take the time from an Open to its Opened, which waits for no pass: about a round trip."""
        self._link_seconds = seconds

    def observe_decoded(self, tokens: int, first_seconds: float | None, seconds: float) -> None:
        """Take the figures of tokens that the target decoded alone.

        Args:
            tokens: how many came.
            first_seconds: until the first came; None where the base station may still have been reading the prompt.
            seconds: from the first to the last.
        """
        if tokens > 1:
            now, before = max(seconds / (tokens - 1), _INSTANT), self._target_seconds
            self._target_seconds = now if before is None else (now + before) / 2
        if first_seconds is None:
            first_seconds = self._link_seconds + (self._target_seconds or 0.0)
        self._rounds.fade(KEPT_ALONE ** (tokens / SHORTEST_WAIT))
        if self._alone:
            self._replies.shift(first_seconds - self._replies.intercept)
        self._replies.observe(0, first_seconds)
        self._review(True, tokens, first_seconds + seconds)

    def observe(
        self, margins: Sequence[float | None], accepted: int, draft_seconds: float, reply_seconds: float | None
    ) -> None:
        """Take the figures of a round; one that drafted nothing teaches nothing.

        Args:
            margins: of its drafted tokens.
            accepted: how many of them stood.
            draft_seconds: that drafting took.
            reply_seconds: from sending the Draft to its Verdict; None where the base station may still have been
                reading the prompt.
        """
        if not margins:
            return
        self._observe_tokens(margins, accepted)
        self._drafting.observe(draft_seconds, len(margins))
        if reply_seconds is not None:
            self._replies.observe(len(margins), reply_seconds)
            self._rounds.observe(accepted + 1, draft_seconds + reply_seconds)
            self._rounds_seen += 1
            self._review(False, accepted + 1, draft_seconds + reply_seconds)

    def _observe_tokens(self, margins: Sequence[float | None], accepted: int) -> None:
        self._stands.fade()
        for place, margin in enumerate(margins[: accepted + 1]):
            self._stands.observe(place < accepted)
            if margin is not None:
                share = self._by_margin.setdefault(bisect(_MARGINS, margin), Share())
                share.fade()
                share.observe(place < accepted)

    def _review(self, alone: bool, tokens: int, seconds: float) -> None:
        """Choose the way to go on, after ``tokens`` in ``seconds`` by drafting, or of the target ``alone``."""
        if self._target_seconds is None:
            return
        times, alpha = self.times, self.alpha
        best = times.best_draft_len(alpha, range(1, MAX_DRAFT_LEN + 1))
        self._foreseen = expected_tokens(alpha, best), times.seconds(best)
        self._since += tokens
        pays = self.speedup >= min(1.0, sqrt(self._rounds_seen / _CERTAIN_ROUNDS))
        if pays is self._alone:
            self._alone, self._since, self._wait = not pays, 0, SHORTEST_WAIT
        elif alone is not self._alone:
            tokens_per_second = 1 / self._target_seconds if self._alone else self._tokens_per_second()
            lost = seconds * tokens_per_second - tokens
            share = _TARGET_TRIALS_SHARE if alone else TRIALS_SHARE
            self._since, self._wait = 0, max(SHORTEST_WAIT, round(lost / share))

    def _tokens_per_second(self) -> float:
        """Of rounds: as measured, ``_PRIOR_ROUNDS`` counting as they are foreseen."""
        tokens, seconds = self._foreseen
        measured = self._rounds
        return (measured.above + _PRIOR_ROUNDS * tokens) / (measured.below + _PRIOR_ROUNDS * seconds + _INSTANT)

    def _acceptance(self, margin: float | None) -> float:
        if margin is None:
            return self.alpha
        place = bisect(_MARGINS, margin)
        start = min([self.alpha, *_CLOSE_CALLS[place : place + 1]])
        share = self._by_margin.get(place)
        return share.mean(start) if share else start
