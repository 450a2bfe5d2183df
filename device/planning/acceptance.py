"""How often drafted tokens are accepted, by what tells it: the token's margin or its match in prompt lookup."""

from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import TypeAlias

from common.estimates import Share
from device.drafting.prompt_lookup import Match, Proposal
from device.planning.planner_lookup import LookupAcceptance

Evidence: TypeAlias = float | Match | None
"""What tells the acceptance of a drafted token: its margin or the match that it followed; None where it was sampled."""
_KNOWN_TRIALS = 8.0
"""What an earlier process learnt counts as so many drafted tokens, so that a change is noticed soon."""
_MARGIN_BOUNDS = (0.15, 0.3, 0.5)
"""Bounds of the margin classes, in nats; the acceptance rate is estimated for each class."""
_PRIOR_ACCEPTANCE = (0.6, 0.9)
"""Upper bounds of the initial acceptance rate in the classes of the smallest margins."""


class Acceptance:
    """The estimated probability that a drafted token is accepted, given that all before it were.

    It is estimated by *margin*, the gap between the two highest scores, where the argmax
    is drafted: in modes ``ids`` and ``coupled``, and at temperature 0 in all modes. Sampled
    tokens share one estimate. That of tokens from prompt lookup is estimated by the length
    of their match.

    Args:
        prior: the mean before anything is observed.
    """

    def __init__(self, prior: float) -> None:
        self._all = Share(prior)
        self._by_margin: dict[int, Share] = {}
        self._lookup = LookupAcceptance()

    def start(self, mean: float, by_margin: Mapping[int, float]) -> None:
        """Start from what an earlier process learnt."""
        self._all = Share(mean, _KNOWN_TRIALS)
        self._by_margin = {index: Share(share, _KNOWN_TRIALS) for index, share in by_margin.items()}

    @property
    def mean(self) -> float:
        """Of all tokens of the draft model."""
        return self._all.mean()

    @property
    def is_observed(self) -> bool:
        """Whether anything is known beside the prior."""
        return bool(self._all)

    @property
    def by_margin(self) -> dict[int, float]:
        """Of each margin class that was seen."""
        return {index: self._of_class(index) for index in self._by_margin}

    def of(self, evidence: Evidence) -> float:
        """Of a token with this evidence."""
        if isinstance(evidence, Match):
            return self._lookup.of(evidence)
        return self.mean if evidence is None else self._of_class(bisect(_MARGIN_BOUNDS, evidence))

    def of_all(self, evidence: Iterable[Evidence]) -> float:
        """The probability that all of these consecutive tokens are accepted."""
        return prod(map(self.of, evidence))

    def observe_draft(self, margins: Sequence[float | None], accepted: int, overlapped: bool) -> None:
        """Record how many tokens of a Draft were accepted; one that ``overlapped`` another belongs to its run."""
        if not overlapped:
            self._all.fade()
        for index, margin in enumerate(margins[: accepted + 1]):
            self._all.observe(index < accepted)
            self._observe_margin(margin, index < accepted)

    def observe_assumed(self, margin: float | None, is_right: bool, is_argmax: bool) -> None:
        """Record whether an assumed bonus token was right; see ``Planner.observe_assumed``."""
        if is_argmax:
            self._all.observe(is_right)
        self._observe_margin(margin, is_right)

    def observe_guess(self, margin: float | None, is_right: bool) -> None:
        """Record whether a guess was right; a wrong one ends a run, as a rejection does."""
        self._all.observe(is_right)
        self._observe_margin(margin, is_right)
        if not is_right:
            self._all.fade()

    def observe_proposal(self, proposal: Proposal, committed: Sequence[int]) -> None:
        """Record what was committed where a proposal of prompt lookup would have begun."""
        self._lookup.observe(proposal, committed)

    def _observe_margin(self, margin: float | None, is_accepted: bool) -> None:
        if margin is not None:
            share = self._by_margin.setdefault(bisect(_MARGIN_BOUNDS, margin), Share())
            share.fade()
            share.observe(is_accepted)

    def _of_class(self, margin_class: int) -> float:
        prior = min([self.mean, *_PRIOR_ACCEPTANCE[margin_class : margin_class + 1]])
        share = self._by_margin.get(margin_class)
        return share.mean(prior) if share else prior
