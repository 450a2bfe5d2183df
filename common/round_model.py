"""How many tokens a round yields, how long it takes, and which draft length is best.

The paper's formulas (arXiv:2509.04576), and a model of a round's time that adds
round trip, downlink and verification time. The device's planner and the export's
choice of weights use ``RoundTimes`` and ``expected_tokens``; ``optimal_draft_len``,
``adaptive_draft_len`` and ``drafting_cost`` reproduce the paper in ``bench/theory.py``. Knows
numbers, not models or links.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf
from operator import mul
from typing import TypeAlias

from protocol.errors import SettingsError

SEARCH_LIMIT = 1024
"""Longest draft length considered: with an acceptance of 1 the best one is infinite."""

Acceptance: TypeAlias = float | Sequence[float]
"""The probability that a drafted token is accepted given that all before it were: one for all positions, or a sequence
by position whose last value holds for all further ones."""


def expected_tokens(alpha: Acceptance, draft_len: int) -> float:
    """E(γ), the expected tokens of a round: 1 + α₁ + α₁α₂ + …, γ + 1 terms.

    With one α it is (1 − α^(γ+1)) / (1 − α) (arXiv:2509.04576; Leviathan et al. 2023, eq. 1).

    Args:
        alpha: α, each in [0, 1].
        draft_len: γ, tokens drafted, 0 or more.

    Raises:
        SettingsError: a value is not allowed.
    """
    _check_count("draft_len", draft_len)
    return _expected_by_len(alpha, draft_len)[-1]


def run_tokens(alpha: Acceptance) -> float:
    """E(∞): the expected tokens of a run, up to and with the one that takes the place of a rejected token.

    With one α it is 1 / (1 − α). It is at most ``SEARCH_LIMIT``: with an acceptance of 1 no run ends.

    Raises:
        SettingsError: a value is not allowed.
    """
    return min(float(SEARCH_LIMIT), expected_tokens(alpha, SEARCH_LIMIT))


def speedup(alpha: Acceptance, cost: float, draft_len: int) -> float:
    """S(γ) = E(γ) / (1 + γL): tokens per second over those of the target alone (arXiv:2509.04576).

    Args:
        alpha: α, each in [0, 1].
        cost: L, the time to draft and send one token over the time of a forward pass of the target.
        draft_len: γ, tokens drafted, 0 or more.

    Raises:
        SettingsError: a value is not allowed.
    """
    _check_measure("cost", cost)
    return expected_tokens(alpha, draft_len) / (1 + draft_len * cost)


def optimal_draft_len(alpha: Acceptance, cost: float) -> int:
    """γ*, the draft length from 1 to ``SEARCH_LIMIT`` with the largest speedup; the shorter of equals.

    Raises:
        SettingsError: a value is not allowed.
    """
    _check_measure("cost", cost)
    speedups = [
        tokens / (1 + draft_len * cost) for draft_len, tokens in enumerate(_expected_by_len(alpha, SEARCH_LIMIT))
    ]
    return max(range(1, SEARCH_LIMIT + 1), key=speedups.__getitem__)


def adaptive_draft_len(alpha: Acceptance, cost: float) -> int:
    """γ* where S(γ*) > 1, else 0, the target alone: the paper's adaptive rule.

    Raises:
        SettingsError: a value is not allowed.
    """
    best = optimal_draft_len(alpha, cost)
    return best if speedup(alpha, cost, best) > 1 else 0


def drafting_cost(draft_cost: float, full_airtime: float, uplink_k: int, vocab_size: int) -> float:
    """L = c + b·K/V: the cost of a drafted token of whose V probabilities K are sent (arXiv:2509.04576).

    Args:
        draft_cost: c, the time to draft a token over the time of a forward pass of the target.
        full_airtime: b, the time to send all V probabilities over the time of a forward pass of the target.
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
    """Traffic of a round in one direction: ``round_bytes``, and ``token_bytes`` for each drafted token."""

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
    """Times of a round in seconds, including what 1 + γL leaves out.

    A round drafts γ tokens, sends them, verifies them and returns the Verdict, one
    after the other. The target alone streams: its tokens follow each other at the
    rate of forward passes, whatever the round trip.

    Attributes:
        draft_seconds: to draft one token.
        verify_seconds: of a forward pass that verifies so many drafted tokens.
        round_trip_seconds: of the link, without airtime.
        uplink: traffic to the base station.
        downlink: traffic to the device.
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
        """Time of a round: γ·draft + airtime up + verify(γ) + airtime down + round trip."""
        both_ends = draft_len * self.draft_seconds + self.verify_seconds(draft_len)
        link = self.round_trip_seconds + self.uplink.seconds(draft_len) + self.downlink.seconds(draft_len)
        return both_ends + link

    def target_seconds(self) -> float:
        """Time between two tokens of the target alone."""
        return max(self.verify_seconds(0), self.downlink.seconds(0))

    def speedup(self, alpha: Acceptance, draft_len: int) -> float:
        """Tokens per second in rounds of ``draft_len`` tokens over those of the target alone; 1 at ``draft_len`` 0.

        Raises:
            SettingsError: a value is not allowed.
        """
        if draft_len == 0:
            return 1.0
        return expected_tokens(alpha, draft_len) * self.target_seconds() / self.seconds(draft_len)

    def run_seconds(self, alpha: float, draft_len: int, drafts_ahead: int) -> float:
        """Time of a run, from one rejection to the next, with up to ``drafts_ahead`` further Drafts in flight.

        The first Draft of a run takes a round like any other. Meanwhile the next ones, each with its assumed bonus
        token γ + 1 tokens, are drafted, sent and verified, so that a Verdict follows another after the time of the
        slowest stage, or of the round that all Drafts of a full window wait for:

            p = max((γ + 1)·draft, verify(γ), airtime(γ), round(γ)/(1 + ahead))

        The run ends with the Verdict of the Draft that has the wrong token, or that comes before it where the assumed
        bonus token is wrong. Before it k whole Drafts with the bonus token after them were right. Each is so with
        probability α^(γ+1), so that k is α^(γ+1)/(1 − α^(γ+1)) on average:

            round(γ) + k·p + draft/2

        The last term is there because the device reads the Verdict after the token that it is drafting. With no Draft
        ahead it is not; p is round(γ), and a run has as many tokens per second as a round of E(γ) tokens.

        Raises:
            SettingsError: a value is not allowed.
        """
        _check_probability(alpha)
        round_seconds, period = self.seconds(draft_len), draft_len + 1
        airtime = self.uplink.seconds(draft_len), self.downlink.seconds(draft_len)
        stages = (period * self.draft_seconds, self.verify_seconds(draft_len), *airtime)
        pace = max(*stages, round_seconds / (1 + drafts_ahead))
        right = alpha**period
        further = right / max(1 - right, period / SEARCH_LIMIT)  # as ``run_tokens`` is limited
        busy = self.draft_seconds / 2 if drafts_ahead else 0.0
        return round_seconds + further * pace + busy

    def best_run_len(self, alpha: float, lengths: Sequence[int], drafts_ahead: int) -> int:
        """The one of ``lengths`` with the shortest run; the first of equals."""
        return min(lengths, key=lambda draft_len: self.run_seconds(alpha, draft_len, drafts_ahead))

    def best_draft_len(self, alpha: Acceptance, lengths: Sequence[int]) -> int:
        """The one of ``lengths`` with the largest speedup; the first of equals."""
        return max(lengths, key=lambda draft_len: self.speedup(alpha, draft_len))


def _expected_by_len(alpha: Acceptance, longest: int) -> list[float]:
    """E(γ) for γ from 0 to ``longest``."""
    values = [alpha] if isinstance(alpha, int | float) else list(alpha)
    for value in values:
        _check_probability(value)
    if not values:
        raise SettingsError("alpha", alpha, "a probability, or a non-empty sequence of them")
    by_position = (values + values[-1:] * (longest - len(values)))[:longest]
    return list(accumulate(accumulate(by_position, mul, initial=1.0)))


def _check_probability(alpha: float) -> None:
    if not 0 <= alpha <= 1:  # NaN compares false
        raise SettingsError("alpha", alpha, "0 to 1, a probability")


def _check_count(name: str, value: int) -> None:
    if value < 0:
        raise SettingsError(name, value, "0 or more")


def _check_measure(name: str, value: float) -> None:
    if not 0 <= value < inf:
        raise SettingsError(name, value, "a finite number, 0 or more")
