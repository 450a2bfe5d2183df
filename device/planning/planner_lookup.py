"""What a planner learns about prompt lookup: how often a proposed token is the target's, by the length of its match.

It is learnt from every proposal, whether it was sent or not: the committed tokens tell. A proposed token whose
predecessors were right follows a match that is longer by them, as one of a new proposal would.
"""

from bisect import bisect
from collections.abc import Sequence

from common.estimates import Share
from device.drafting.prompt_lookup import Match, Proposal

_LENGTH_BOUNDS = (3, 5, 9, 16)
"""Bounds of the classes of matches, in tokens."""
_PRIOR_ACCEPTANCE = (0.3, 0.4, 0.55, 0.7, 0.8)
"""The initial acceptance rate of each class."""


class LookupAcceptance:
    """The estimated probability that a proposed token is accepted, given that all before it were."""

    def __init__(self) -> None:
        self._by_length = [Share(prior) for prior in _PRIOR_ACCEPTANCE]

    def of(self, match: Match) -> float:
        """The probability for a token that followed ``match``."""
        return self._share(match).mean()

    def observe(self, proposal: Proposal, committed: Sequence[int]) -> None:
        """Compare a proposal with the tokens that were ``committed`` where it would have begun."""
        for index, (proposed, token_id) in enumerate(zip(proposal.token_ids, committed, strict=False)):
            share = self._share(proposal.match.after(index))
            share.fade()
            share.observe(proposed == token_id)
            if proposed != token_id:
                break

    def _share(self, match: Match) -> Share:
        return self._by_length[bisect(_LENGTH_BOUNDS, match.length)]
