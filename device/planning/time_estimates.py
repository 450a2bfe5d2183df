"""How long the steps of a round take: running estimates that follow changes.

Knows numbers, not models or links; the formulas are in ``common/round_model.py``.
"""

from math import inf

from common.estimates import Line, OutlierLimit, SecondsPerToken
from common.round_model import RoundTimes
from device.planning.planner_figures import PlannerFigures

ASSUMED_COST = 1 / 4
"""Time to draft a token over the time of a forward pass of the target, before either is measured."""
PREFILL_COST = 1 / 5
"""Time to run a token of a prompt through either model over that of a pass for one token, before it is measured."""
_KNOWN_TRIALS = 8.0
"""What an earlier process learnt counts as so many drafted tokens."""
_LEVEL_SHARE = 1 / 8
"""Of a reply that is not on the line, how much moves all of it: links change, and the target's slope does not."""
_SHORTEST = 1e-9


class TimeEstimates:
    """Seconds of each step.

    The time of a reply is a line over the number of drafted tokens: its intercept is the
    round trip plus one forward pass, its slope the time to send and verify a token.

    Each time is limited by ``OutlierLimit``: a device that was suspended, a lost message
    or a reader who stops reading lengthens one.

    Attributes:
        target_seconds: between two tokens of the target alone; None before it is known.
        opened_seconds: of the last Opened, about a round trip.
    """

    def __init__(self) -> None:
        self.target_seconds: float | None = None
        self.opened_seconds = 0.0
        self._replies = Line()
        self._drafting = SecondsPerToken()
        self._prefills = SecondsPerToken()  # of a prompt
        self._target_prefills = SecondsPerToken()  # the same of the target
        self._target_outliers, self._reply_outliers, self._round_outliers = (OutlierLimit() for _ in range(3))
        self._longest_link: float | None = None  # while nothing of this process is observed
        self._opened: float | None = None  # ``opened_seconds``, until a reply tells more

    def start(self, pass_seconds: float, row_seconds: float, known: PlannerFigures | None) -> None:
        """Start from figures measured before; see ``Planner.start``."""
        self._longest_link = known.link_seconds if known else inf
        self.target_seconds = max(pass_seconds or (known.target_seconds if known else 0.0), _SHORTEST)
        if known is None:
            self._replies = Line.through(self.target_seconds, row_seconds)
            return
        self.opened_seconds = known.link_seconds
        self._replies = Line.through(self.target_seconds + known.link_seconds, known.token_seconds)
        self._drafting.observe(_KNOWN_TRIALS * known.draft_seconds, _KNOWN_TRIALS)
        self._prefills.observe(_KNOWN_TRIALS * known.prefill_seconds, _KNOWN_TRIALS)

    @property
    def round_times(self) -> RoundTimes:
        """Of a round; what a token adds to a reply counts as verification."""
        target_seconds, slope = self.target_seconds or 0.0, self._replies.slope
        draft_seconds = self._drafting.value if self._drafting else ASSUMED_COST * target_seconds
        return RoundTimes(draft_seconds, lambda draft_len: target_seconds + draft_len * slope, self._link_seconds)

    @property
    def _link_seconds(self) -> float:
        """The round trip."""
        return max(0.0, self._replies.intercept - (self.target_seconds or 0.0))

    @property
    def knows_link(self) -> bool:
        """Whether a reply was observed, in this process or in an earlier one."""
        return bool(self._replies) and self._longest_link != inf

    @property
    def reply_seconds(self) -> float:
        """Of a reply to a Draft without tokens: the round trip and a forward pass."""
        return self._replies.intercept

    @property
    def token_seconds(self) -> float:
        """What a drafted token adds to a reply."""
        return self._replies.slope

    @property
    def prefill_token_seconds(self) -> float:
        """To run a token of a long prompt through the draft model."""
        return self._prefills.value if self._prefills else PREFILL_COST * self.round_times.draft_seconds

    @property
    def target_prefill_token_seconds(self) -> float:
        """What a token of a prompt adds to the first reply, which waits until the target has run the prompt."""
        return self._target_prefills.value if self._target_prefills else PREFILL_COST * (self.target_seconds or 0.0)

    @property
    def drafting_is_slower(self) -> bool:
        """Whether drafting a token takes as long as a forward pass of the target, so that it cannot pay."""
        return bool(self._drafting) and self._drafting.value >= (self.target_seconds or 0.0)

    def observe_opened(self, seconds: float, at_most: bool = False) -> None:
        """Record the time from an Open or Extend to its Opened; see ``Planner.observe_opened``."""
        if at_most:
            seconds = min(seconds, self._link_seconds)
        if self._longest_link is not None:
            seconds = min(seconds, self._longest_link)
            self._replies.shift(seconds + (self.target_seconds or 0.0) - self.reply_seconds)
            self._longest_link = None
        self.opened_seconds = self._opened = seconds

    def observe_decoded(self, tokens: int, first_seconds: float | None, seconds: float, is_alone: bool) -> float:
        """Record the times of tokens that the target decoded alone; see ``Planner.observe_decoded``.

        Args:
            tokens: how many were received.
            first_seconds: until the first; None where it also waited for a prefill: an Opened and a pass are taken.
            seconds: from the first to the last.
            is_alone: whether no Draft's reply is measured meanwhile, so that the link may have changed unnoticed.

        Returns:
            The time to the last token.
        """
        if tokens > 1:
            now, before = max(seconds / (tokens - 1), _SHORTEST), self.target_seconds
            now = self._target_outliers.limited(now, before or 0.0)
            seconds = now * (tokens - 1)
            self.target_seconds = now if before is None else (now + before) / 2
        if first_seconds is None:
            link_seconds = self._link_seconds if self._opened is None else self._opened
            first_seconds = link_seconds + (self.target_seconds or 0.0)
        first_seconds = self._reply_outliers.limited(first_seconds, self.reply_seconds)
        if is_alone:
            self._replies.shift(first_seconds - self.reply_seconds)
        self._add_reply(0, first_seconds)
        return first_seconds + seconds

    def observe_drafting(self, tokens: int, seconds: float) -> None:
        """Record the time to draft ``tokens`` tokens."""
        self._drafting.observe(seconds, tokens)

    def observe_reply(self, drafted: int, seconds: float) -> None:
        """Record the time from a Draft of ``drafted`` tokens to its Verdict."""
        expected = self.reply_seconds + drafted * self.token_seconds
        self._add_reply(drafted, self._reply_outliers.limited(seconds, expected))

    def _add_reply(self, drafted: int, seconds: float) -> None:
        self._longest_link = self._opened = None
        line = self._replies
        if line:
            line.shift(_LEVEL_SHARE * (seconds - line.intercept - line.slope * drafted))
        line.observe(drafted, seconds)

    def limited_round(self, drafted: int, seconds: float) -> float:
        """The time of a round of ``drafted`` tokens, which is not recorded here, but limited as all others are."""
        return self._round_outliers.limited(seconds, self.round_times.seconds(drafted))

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Record the time that the draft model took to run ``tokens`` tokens at once."""
        self._prefills.observe(seconds, tokens)

    def observe_target_prefill(self, tokens: int, reply_seconds: float) -> None:
        """Record the time of a reply that waited until the target had run ``tokens`` tokens of a prompt."""
        self._target_prefills.observe(max(0.0, reply_seconds - self.reply_seconds), tokens)
