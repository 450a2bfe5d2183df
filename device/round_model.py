"""The mathematics of draft lengths: what a round yields, how long it takes, and which length is best.

The paper's formulas (arXiv:2509.04576), and a model of a round's time with what
the paper leaves out. Knows numbers, not models or links; the plan that follows
what is measured stands in ``live_planner.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf
from operator import mul
from typing import TypeAlias

from protocol.errors import SettingsError

LONGEST = 1024
"""No draft length beyond is looked at: with an acceptance of 1 the best one is infinite."""

Acceptance: TypeAlias = float | Sequence[float]
"""The probability that a drafted token is accepted if those before it are: one for all positions, or one for each of
the first few, the last of them holding for all further ones."""


def expected_tokens(alpha: Acceptance, draft_len: int) -> float:
    """E(γ), tokens that a round yields: 1 + α₁ + α₁α₂ + …, γ + 1 terms.

    With one α it is (1 − α^(γ+1)) / (1 − α) (arXiv:2509.04576; Leviathan et al. 2023, eq. 1).

    Args:
        alpha: α, each in [0, 1].
        draft_len: γ, tokens drafted, 0 and more.

    Raises:
        SettingsError: a value is not allowed.
    """
    _check_count("draft_len", draft_len)
    return _yields(alpha, draft_len)[-1]


def speedup(alpha: Acceptance, cost: float, draft_len: int) -> float:
    """S(γ) = E(γ) / (1 + γL): tokens a second against the target alone (arXiv:2509.04576).

    Args:
        alpha: α, each in [0, 1].
        cost: L, the time to draft and send one token over that of a pass of the target.
        draft_len: γ, tokens drafted, 0 and more.

    Raises:
        SettingsError: a value is not allowed.
    """
    _check_measure("cost", cost)
    return expected_tokens(alpha, draft_len) / (1 + draft_len * cost)


def optimal_draft_len(alpha: Acceptance, cost: float) -> int:
    """γ*, the draft length from 1 to ``LONGEST`` with the largest speedup; the shorter of equals.

    Raises:
        SettingsError: a value is not allowed.
    """
    _check_measure("cost", cost)
    speedups = [tokens / (1 + draft_len * cost) for draft_len, tokens in enumerate(_yields(alpha, LONGEST))]
    return max(range(1, LONGEST + 1), key=speedups.__getitem__)


def adaptive_draft_len(alpha: Acceptance, cost: float) -> int:
    """γ* where it makes answers faster, 0 where the target alone is as fast: the paper's adaptive rule, S(γ*) > 1.

    Raises:
        SettingsError: a value is not allowed.
    """
    best = optimal_draft_len(alpha, cost)
    return best if speedup(alpha, cost, best) > 1 else 0


def drafting_cost(draft_cost: float, full_airtime: float, uplink_k: int, vocab_size: int) -> float:
    """L = c + b·K/V: the cost of a drafted token of whose V probabilities K are sent (arXiv:2509.04576).

    Args:
        draft_cost: c, the time to draft a token over that of a pass of the target.
        full_airtime: b, the time to send all V probabilities over that of a pass of the target.
        uplink_k: K, from 1 to V.
        vocab_size: V.

    Raises:
        SettingsError: a value is not allowed.
    """
    _check_measure("draft_cost", draft_cost)
    _check_measure("full_airtime", full_airtime)
    if not 1 <= uplink_k <= vocab_size:
        raise SettingsError("uplink_k", uplink_k, f"1 to {vocab_size}, the size of the vocabulary")
    return draft_cost + full_airtime * uplink_k / vocab_size


@dataclass(frozen=True)
class Direction:
    """What a round sends one way: ``round_bytes``, and ``token_bytes`` for each drafted token."""

    round_bytes: float = 0.0
    token_bytes: float = 0.0
    bytes_per_second: float = inf

    def __post_init__(self) -> None:
        _check_measure("round_bytes", self.round_bytes)
        _check_measure("token_bytes", self.token_bytes)
        if not self.bytes_per_second > 0:
            raise SettingsError("bytes_per_second", self.bytes_per_second, "above 0")

    def seconds(self, draft_len: int) -> float:
        """Airtime of a round of ``draft_len`` tokens."""
        return (self.round_bytes + draft_len * self.token_bytes) / self.bytes_per_second


@dataclass(frozen=True)
class RoundTimes:
    """How long a round takes, in seconds, with all that 1 + γL leaves out.

    A round drafts γ tokens, sends them, has them judged and hears the verdict, one
    after the other. The target alone streams: its tokens follow each other at the
    pace of passes, whatever the round trip.

    Attributes:
        draft_seconds: to draft one token.
        verify_seconds: of a pass that judges so many drafted tokens.
        round_trip_seconds: of the link, without airtime.
        uplink: what is sent to the base station.
        downlink: what comes back.
    """

    draft_seconds: float
    verify_seconds: Callable[[int], float]
    round_trip_seconds: float = 0.0
    uplink: Direction = field(default_factory=Direction)
    downlink: Direction = field(default_factory=Direction)

    def __post_init__(self) -> None:
        _check_measure("draft_seconds", self.draft_seconds)
        _check_measure("round_trip_seconds", self.round_trip_seconds)

    def seconds(self, draft_len: int) -> float:
        """Of a round: γ·draft + airtime up + verify(γ) + airtime down + round trip."""
        both_ends = draft_len * self.draft_seconds + self.verify_seconds(draft_len)
        link = self.round_trip_seconds + self.uplink.seconds(draft_len) + self.downlink.seconds(draft_len)
        return both_ends + link

    def target_seconds(self) -> float:
        """Of a token that the target alone adds to a stream."""
        return max(self.verify_seconds(0), self.downlink.seconds(0))

    def speedup(self, alpha: Acceptance, draft_len: int) -> float:
        """Tokens a second in rounds of ``draft_len`` drafted tokens against the target alone; 1 at 0, where it is that.

        Raises:
            SettingsError: a value is not allowed.
        """
        if draft_len == 0:
            return 1.0
        return expected_tokens(alpha, draft_len) * self.target_seconds() / self.seconds(draft_len)

    def best_draft_len(self, alpha: Acceptance, lengths: Sequence[int]) -> int:
        """The one of ``lengths`` with the largest speedup; the first of equals."""
        return max(lengths, key=lambda draft_len: self.speedup(alpha, draft_len))


def _yields(alpha: Acceptance, longest: int) -> list[float]:
    """E(γ) for γ from 0 to ``longest``."""
    values = [alpha] if isinstance(alpha, int | float) else list(alpha)
    for value in values:
        if not 0 <= value <= 1:  # NaN compares false
            raise SettingsError("alpha", value, "0 to 1, a probability")
    if not values:
        raise SettingsError("alpha", alpha, "a probability, or one and more of them")
    by_position = (values + values[-1:] * (longest - len(values)))[:longest]
    return list(accumulate(accumulate(by_position, mul, initial=1.0)))


def _check_count(name: str, value: int) -> None:
    if value < 0:
        raise SettingsError(name, value, "0 and more")


def _check_measure(name: str, value: float) -> None:
    if not 0 <= value < inf:
        raise SettingsError(name, value, "a number, 0 and more")
