"""How many tokens to draft in a round: the paper's formulas, and a plan that follows what is measured.

Knows numbers, not models or links.
"""

from bisect import bisect
from collections.abc import Sequence
from math import prod

from protocol.bundle import GateFigures

ASSUMED_COST = 1 / 4
"""Time to draft a token over that of a round trip, before either is measured: models of one size on like machines."""
MAX_DRAFT_LEN = 24
"""No plan drafts more: the formulas take acceptance to be the same at every position, which fails far out."""
_KEPT = 0.95
_PRIOR_TRIALS = 4.0
_PRIOR_SPREAD = 4.0
_LEADS = (0.1, 0.25, 0.5, 1.0, 2.0)
"""Between these leads, in units of the natural logarithm of a probability, tokens count as equally likely to stand."""


def expected_tokens(alpha: float, draft_len: int) -> float:
    """Tokens a round yields: (1 − α^(γ+1)) / (1 − α) (arXiv:2509.04576; Leviathan et al. 2023, eq. 1).

    Args:
        alpha: probability that a drafted token is accepted, in [0, 1].
        draft_len: γ, tokens drafted.
    """
    return sum(alpha**position for position in range(draft_len + 1))


def speedup(alpha: float, cost: float, draft_len: int) -> float:
    """S(γ) = E(γ) / (1 + γL): tokens a second against the target alone (arXiv:2509.04576).

    Args:
        alpha: probability that a drafted token is accepted, in [0, 1].
        cost: L, the time to draft and send one token.
        draft_len: γ, tokens drafted.
    """
    return expected_tokens(alpha, draft_len) / (1 + draft_len * cost)


def optimal_draft_len(alpha: float, cost: float) -> int:
    """γ*, the draft length from 1 to ``MAX_DRAFT_LEN`` with the largest speedup; the shorter of equals."""
    return max(range(1, MAX_DRAFT_LEN + 1), key=lambda draft_len: speedup(alpha, cost, draft_len))


class DraftLenPlanner:
    """Says after each drafted token whether another is worth its time.

    One more token adds the probability that it stands, and takes the time ``d``
    to draft it and ``b`` to send and judge it. It is drafted where that gives at
    least the tokens a second of whole rounds: the rule that makes a ratio
    largest (Dinkelbach 1967). All figures are running estimates in which each
    round counts for ``_KEPT`` of the one after it.

    How likely a token stands is learnt from its *lead*: by how much its score
    exceeds the next one's, in modes that send ids alone. A close call is where
    two models differ. Other modes have one probability for all tokens.

    Args:
        gate: figures of the draft model; its likeness to the target is where estimates start.
        greedy: whether the target is sampled at temperature 0.
    """

    def __init__(self, gate: GateFigures, greedy: bool) -> None:
        self._all = _Share(gate.argmax_agreement if greedy else gate.overlap)
        self._by_lead: dict[int, _Share] = {}
        self._first_draft_len = optimal_draft_len(self._all.mean(), ASSUMED_COST)
        self._tokens = self._drafted = self._draft_seconds = self._reply_seconds = 0.0
        self._replies = _Slope()

    @property
    def alpha(self) -> float:
        """The probability that a drafted token is accepted, as estimated now."""
        return self._all.mean()

    def goes_on(self, leads: Sequence[float | None]) -> bool:
        """Whether to draft another token after those with the ``leads``, None where there is none to know."""
        if not leads:
            return True
        if not self._drafted:
            return len(leads) < self._first_draft_len
        stands = self.alpha * prod(map(self._acceptance, leads))
        tokens_per_second = self._tokens / max(self._draft_seconds + self._reply_seconds, 1e-9)
        seconds = self._draft_seconds / self._drafted + self._replies.slope
        return len(leads) < MAX_DRAFT_LEN and stands >= seconds * tokens_per_second

    def observe(self, leads: Sequence[float | None], accepted: int, draft_seconds: float, reply_seconds: float) -> None:
        """Take the figures of a round; one that drafted nothing teaches nothing.

        Args:
            leads: of its drafted tokens.
            accepted: how many of them stood.
            draft_seconds: that drafting took.
            reply_seconds: from sending the Draft to its Verdict.
        """
        if not leads:
            return
        self._all.fade()
        for place, lead in enumerate(leads[: accepted + 1]):
            self._all.observe(place < accepted)
            if lead is not None:
                share = self._by_lead.setdefault(bisect(_LEADS, lead), _Share())
                share.fade()
                share.observe(place < accepted)
        self._tokens = _KEPT * self._tokens + accepted + 1
        self._drafted = _KEPT * self._drafted + len(leads)
        self._draft_seconds = _KEPT * self._draft_seconds + draft_seconds
        self._reply_seconds = _KEPT * self._reply_seconds + reply_seconds
        self._replies.observe(len(leads), reply_seconds)

    def _acceptance(self, lead: float | None) -> float:
        share = None if lead is None else self._by_lead.get(bisect(_LEADS, lead))
        return share.mean(self.alpha) if share else self.alpha


class _Share:
    """How often something happened, over trials that fade; begins at ``start``."""

    def __init__(self, start: float = 0.0) -> None:
        self._start = start
        self._hits = self._trials = 0.0

    def fade(self) -> None:
        """Make all trials so far count a little less."""
        self._hits *= _KEPT
        self._trials *= _KEPT

    def observe(self, hit: bool) -> None:
        """Take a trial."""
        self._hits += hit
        self._trials += 1

    def mean(self, start: float | None = None) -> float:
        """The share, its start (or another) counting as ``_PRIOR_TRIALS``."""
        begin = self._start if start is None else start
        return (self._hits + _PRIOR_TRIALS * begin) / (self._trials + _PRIOR_TRIALS)


class _Slope:
    """The slope of a line through points that fade: never negative, and near 0 where they lie close together."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, x: float, y: float) -> None:
        """Take a point."""
        self._weight = _KEPT * self._weight + 1
        self._x = _KEPT * self._x + x
        self._y = _KEPT * self._y + y
        self._xx = _KEPT * self._xx + x * x
        self._xy = _KEPT * self._xy + x * y

    @property
    def slope(self) -> float:
        """How much y grows with x."""
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x**2
        return max(0.0, self._xy / self._weight - mean_x * mean_y) / (spread + _PRIOR_SPREAD)
