"""How many tokens to draft next, and whether to draft at all, decided from what was measured.

Knows numbers, not models or links; the formulas are in ``round_model.py``.
"""

from bisect import bisect
from collections.abc import Callable, Sequence
from math import prod, sqrt

from device.estimates import Line, Ratio, Share
from device.round_model import RoundTimes, expected_tokens
from device.settings import DraftSettings
from protocol.bundle import QualityFigures
from protocol.messages import Mode

MAX_DRAFT_LEN = 32
"""Longest planned draft: the formulas assume the same acceptance at every position, which fails further out."""
ASSUMED_COST = 1 / 4
"""Time to draft a token over the time of a forward pass of the target, before either is measured."""
FIRST_DRAFT_LEN = 4
"""The first round is short: the link's rate is not known yet."""
TRIAL = 3
"""Tokens that the target decodes alone to measure its speed: two intervals."""
MIN_WAIT = 64
"""Tokens at least until the slower alternative is tried again."""
TRIAL_SHARE = 1 / 30
"""Largest share of all time that trials of drafting may cost."""
_TARGET_TRIAL_SHARE = 1 / 100
"""The same for trials of the target alone, which run where drafting is faster, usually by far."""
_PRIOR_ROUNDS = 6.0
_CERTAIN_ROUNDS = 32
"""Before this many rounds, drafting is given up only where it is clearly slower: n rounds have an error of 1/√n."""
ALONE_DECAY = 0.5
"""Weight that earlier rounds keep after the target has decoded ``MIN_WAIT`` tokens alone."""
_INSTANT = 1e-9
_MARGIN_BOUNDS = (0.15, 0.3, 0.5)
"""Bounds of the margin classes, in nats; the acceptance rate is estimated for each class."""
_PRIOR_ACCEPTANCE = (0.6, 0.9)
"""Upper bounds of the initial acceptance rate in the classes of the smallest margins."""


class Planner:
    """Decides whether to draft, and after each drafted token whether to draft another.

    One more token adds the probability that it is accepted, and costs the time to
    draft, send and verify it. It is drafted while that ratio is at least the tokens
    per second of whole rounds: the rule that maximises a ratio (Dinkelbach 1967).
    Where rounds give fewer tokens per second than the target alone, the target
    decodes alone (the adaptive rule of arXiv:2509.04576). The slower alternative is
    tried again from time to time.

    All figures are running estimates. The time of a reply is a line over the number
    of drafted tokens: its intercept is the round trip plus one forward pass, its
    slope the time to send and verify a token. Initial estimates come from
    ``round_model.py``.

    The acceptance rate is estimated by *margin*, the gap between the two highest
    scores, where the argmax is drafted: in modes ``ids`` and ``coupled``, and at
    temperature 0 in all modes. Sampled tokens share one estimate.

    Args:
        quality: figures of the quality check, the initial acceptance rate.
        greedy: whether the target is sampled at temperature 0.
    """

    def __init__(self, quality: QualityFigures, greedy: bool) -> None:
        self._acceptance = Share(quality.argmax_agreement if greedy else quality.overlap)
        self._by_margin: dict[int, Share] = {}
        self._target_seconds: float | None = None
        self._link_seconds = 0.0
        self._replies = Line()
        self._drafting = Ratio()  # seconds over drafted tokens
        self._rounds = Ratio()  # tokens over seconds
        self._rounds_seen = 0
        self._predicted = 0.0, 0.0
        self._alone = False
        self._since, self._wait = 0, MIN_WAIT

    @property
    def alpha(self) -> float:
        """The estimated probability that a drafted token is accepted."""
        return self._acceptance.mean()

    @property
    def times(self) -> RoundTimes:
        """The estimated times of a round; what a token adds to a reply counts as verification."""
        target_seconds, slope = self._target_seconds or 0.0, self._replies.slope
        draft_seconds = self._drafting.value if self._drafting else ASSUMED_COST * target_seconds
        link_seconds = max(0.0, self._replies.intercept - target_seconds)
        return RoundTimes(draft_seconds, lambda draft_len: target_seconds + draft_len * slope, link_seconds)

    @property
    def speedup(self) -> float:
        """Estimated tokens per second in rounds over those of ``MIN_WAIT`` tokens of the target alone.

        1 before both are known.
        """
        if self._target_seconds is None:
            return 1.0
        alone_seconds = self._target_seconds + self.times.round_trip_seconds / MIN_WAIT
        return self.tokens_per_second * alone_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of rounds: as measured, with the prediction counting as ``_PRIOR_ROUNDS`` rounds."""
        tokens, seconds = self._predicted
        measured = self._rounds
        return (measured.above + _PRIOR_ROUNDS * tokens) / (measured.below + _PRIOR_ROUNDS * seconds + _INSTANT)

    def decode_len(self) -> int:
        """How many tokens the target should decode alone now; 0 to draft."""
        if self._target_seconds is None:
            return TRIAL
        trial_due = self._since >= self._wait
        if self._alone:
            return 0 if trial_due else self._wait - self._since
        return TRIAL if trial_due else 0

    def should_continue(self, margins: Sequence[float | None]) -> bool:
        """Whether to draft another token after those with these ``margins``; None where the token was sampled."""
        if not margins:
            return True
        if len(margins) >= (MAX_DRAFT_LEN if self._rounds_seen else FIRST_DRAFT_LEN):
            return False
        accepted = self.alpha * prod(map(self._acceptance_at, margins))
        times = self.times
        seconds = times.seconds(1) - times.seconds(0)
        return accepted >= seconds * self.tokens_per_second

    def observe_opened(self, seconds: float) -> None:
        """Record the time from an Open to its Opened, which waits for no forward pass: about a round trip."""
        self._link_seconds = seconds

    def observe_decoded(self, tokens: int, first_seconds: float | None, seconds: float) -> None:
        """Record the times of tokens that the target decoded alone.

        Args:
            tokens: how many were received.
            first_seconds: until the first; None where the base station may still have been prefilling.
            seconds: from the first to the last.
        """
        if tokens > 1:
            now, before = max(seconds / (tokens - 1), _INSTANT), self._target_seconds
            self._target_seconds = now if before is None else (now + before) / 2
        if first_seconds is None:
            first_seconds = self._link_seconds + (self._target_seconds or 0.0)
        self._rounds.fade(ALONE_DECAY ** (tokens / MIN_WAIT))
        if self._alone:
            self._replies.shift(first_seconds - self._replies.intercept)
        self._replies.observe(0, first_seconds)
        self._review(True, tokens, first_seconds + seconds)

    def observe(
        self, margins: Sequence[float | None], accepted: int, draft_seconds: float, reply_seconds: float | None
    ) -> None:
        """Record a round; one that drafted nothing is ignored.

        Args:
            margins: of its drafted tokens.
            accepted: how many of them were accepted.
            draft_seconds: the time to draft them.
            reply_seconds: from the Draft to its Verdict; None where the base station may still have been prefilling.
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
        self._acceptance.fade()
        for index, margin in enumerate(margins[: accepted + 1]):
            self._acceptance.observe(index < accepted)
            if margin is not None:
                share = self._by_margin.setdefault(bisect(_MARGIN_BOUNDS, margin), Share())
                share.fade()
                share.observe(index < accepted)

    def _review(self, alone: bool, tokens: int, seconds: float) -> None:
        """Choose how to go on, after ``tokens`` in ``seconds`` by drafting, or by the target ``alone``."""
        if self._target_seconds is None:
            return
        times, alpha = self.times, self.alpha
        best = times.best_draft_len(alpha, range(1, MAX_DRAFT_LEN + 1))
        self._predicted = expected_tokens(alpha, best), times.seconds(best)
        self._since += tokens
        pays = self.speedup >= min(1.0, sqrt(self._rounds_seen / _CERTAIN_ROUNDS))
        if pays is self._alone:
            self._alone, self._since, self._wait = not pays, 0, MIN_WAIT
        elif alone is not self._alone:
            tokens_per_second = 1 / self._target_seconds if self._alone else self.tokens_per_second
            lost = seconds * tokens_per_second - tokens
            share = _TARGET_TRIAL_SHARE if alone else TRIAL_SHARE
            self._since, self._wait = 0, max(MIN_WAIT, round(lost / share))

    def _acceptance_at(self, margin: float | None) -> float:
        if margin is None:
            return self.alpha
        index = bisect(_MARGIN_BOUNDS, margin)
        prior = min([self.alpha, *_PRIOR_ACCEPTANCE[index : index + 1]])
        share = self._by_margin.get(index)
        return share.mean(prior) if share else prior


class Planners:
    """The planners of one base station: settings whose estimates differ have planners of their own.

    Rounds of a fixed draft length do not update the planner of ``--draft-len auto``: their
    throughput is not what it would reach.

    Args:
        quality: figures of the draft model's quality check.
        new_planner: makes a planner.
    """

    def __init__(
        self, quality: QualityFigures, new_planner: Callable[[QualityFigures, bool], Planner] = Planner
    ) -> None:
        self._quality = quality
        self._new_planner = new_planner
        self._planners: dict[tuple[Mode, float, int | None], Planner] = {}

    def for_settings(self, settings: DraftSettings) -> Planner:
        """The planner for a mode, temperature and fixed draft length."""
        key = (settings.mode, settings.sampling.temperature, settings.draft_len)
        if key not in self._planners:
            self._planners[key] = self._new_planner(self._quality, settings.sampling.greedy)
        return self._planners[key]
