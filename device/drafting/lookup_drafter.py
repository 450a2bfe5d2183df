"""Drafting by prompt lookup, without a forward pass of the draft model."""

from collections.abc import Collection, Sequence

from device.drafting.drafter import DraftedToken
from device.drafting.prompt_lookup import PromptLookup, Proposal
from device.drafting.sampling import certain_distribution
from device.planning.planner import Planner
from device.settings import UplinkSettings
from protocol.messages import DraftDistribution, Mode

_MAX_LEN = 64
"""Longest proposal."""


class LookupDrafter:
    """Proposes what follows the tokens of one session, and tells the planner how good its proposals are.

    Args:
        mode: what is sent for each token.
        uplink: how much of each distribution is sent in modes ``topk`` and ``topp``.
        vocab_size: of the target.
    """

    def __init__(self, mode: Mode, uplink: UplinkSettings, vocab_size: int) -> None:
        self._lookup = PromptLookup()
        self._sends_distributions = not mode.sends_ids_alone
        self._uplink = None if mode is Mode.FULL else uplink
        self._vocab_size = vocab_size
        self._proposal: Proposal | None = None
        self._length = 0

    def begin(self, prompt_ids: Sequence[int], prediction: Sequence[int]) -> None:
        """Prepare for the answer to a prompt, which is perhaps ``prediction``."""
        self._lookup.begin(prompt_ids, prediction)
        self._proposal, self._length = None, 0

    def follow(self, tokens: Sequence[int], stop_ids: Collection[int], planner: Planner) -> None:
        """Search the committed ``tokens`` from now on; tell ``planner`` what followed in place of the last proposal."""
        if len(tokens) == self._length:
            return
        if self._proposal:
            planner.observe_proposal(self._proposal, tokens[self._length :])
        self._lookup.follow(tokens)
        self._proposal, self._length = self._lookup.propose(tokens, _MAX_LEN, stop_ids), len(tokens)

    def propose(self, tokens: Sequence[int], most: int, stop_ids: Collection[int]) -> Proposal | None:
        """Up to ``most`` tokens that may follow ``tokens``, of which the committed ones are the first."""
        return self._lookup.propose(tokens, min(most, _MAX_LEN), stop_ids)

    def drafted(self, proposal: Proposal, count: int) -> list[DraftedToken]:
        """The first ``count`` tokens of a proposal."""
        return [
            DraftedToken(token_id, None, self._distribution(token_id), proposal.match.after(index))
            for index, token_id in enumerate(proposal.token_ids[:count])
        ]

    def _distribution(self, token_id: int) -> DraftDistribution | None:
        """Of a proposed token, in modes that send it: one entry."""
        if not self._sends_distributions:
            return None
        return certain_distribution(token_id, self._vocab_size, self._uplink)
