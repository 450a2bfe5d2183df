"""Drafting: the next few tokens, as the draft model guesses them.

The drafter keeps the draft model's cache in step with the committed tokens by
itself: it rolls back to what both share and runs the rest. Knows no link.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from device.draft_model import DraftModel, Logits
from device.sampling import Uplink, coupled_token, draft_distribution, full_distribution
from protocol.messages import Mode, Sampling
from protocol.randomness import Stream, random_bits
from protocol.sparse import SparseDistribution


@dataclass(frozen=True)
class DraftResult:
    """Drafted tokens and, in sampled modes, the distribution each was drawn from.

    ``margins`` says of each token by how much its score exceeded the next one's,
    where the largest score was taken; None where the token was drawn.
    """

    token_ids: tuple[int, ...]
    distributions: tuple[SparseDistribution, ...]
    margins: tuple[float | None, ...]


class Drafter:
    """Drafts the continuation of a sequence.

    Args:
        model: the draft model; nothing else may run it.
        mode: what is sent for each token.
        sampling: how the target is sampled.
        uplink: how much of each distribution is sent in modes ``topk`` and ``topp``.
    """

    def __init__(self, model: DraftModel, mode: Mode, sampling: Sampling, uplink: Uplink) -> None:
        self._model = model
        self._sampling = sampling
        self._uplink = None if mode is Mode.FULL else uplink
        self._ids_alone = mode.sends_ids_alone
        self._stop_ids = frozenset(model.manifest.stop_ids)
        self._cached: list[int] = []
        self._unrun: list[int] = []

    def prefill(self, tokens: Sequence[int]) -> None:
        """Run all but the last of ``tokens``, so that the first draft need not."""
        self._unrun = self._rollback(tokens)[:-1]
        if self._unrun:
            self._run()

    def draft(
        self,
        tokens: Sequence[int],
        draft_len: int,
        should_continue: Callable[[Sequence[float | None]], bool] | None = None,
    ) -> DraftResult:
        """DraftResult up to ``draft_len`` tokens that follow ``tokens``; ends after a stop id.

        Where there is ``should_continue``, it is asked before each token, with the margins of those before.
        """
        self._unrun = self._rollback(tokens)
        drafted: list[int] = []
        margins: list[float | None] = []
        distributions: list[SparseDistribution] = []
        while len(drafted) < draft_len and (should_continue is None or should_continue(margins)):
            logits = self._run()
            position = len(tokens) + len(drafted)
            margin = None
            if self._ids_alone or self._sampling.greedy:
                token_id, margin = coupled_token(logits, self._sampling, position)
            if not self._ids_alone:
                distribution = self._distribution(logits)
                token_id = distribution.sample(random_bits(self._sampling.seed, position, Stream.DRAFT))
                distributions.append(distribution)
            drafted.append(token_id)
            margins.append(margin)
            if token_id in self._stop_ids:
                break
            self._unrun = [token_id]
        return DraftResult(tuple(drafted), tuple(distributions), tuple(margins))

    def run_ahead(self) -> None:
        """Run the last drafted token, unless it ends the answer: where it stands, the next draft goes on from it."""
        if self._unrun:
            self._run()

    def _run(self) -> Logits:
        logits = self._model.forward(self._unrun)
        self._cached += self._unrun
        self._unrun = []
        return logits

    def _distribution(self, logits: Logits) -> SparseDistribution:
        if self._uplink is None:
            return full_distribution(logits, self._sampling)
        return draft_distribution(logits, self._sampling, self._uplink)

    def _rollback(self, tokens: Sequence[int]) -> list[int]:
        """Forget what ``tokens`` do not begin with; give those not cached, at least the last."""
        shared = 0
        for cached, token in zip(self._cached, tokens[:-1], strict=False):
            if cached != token:
                break
            shared += 1
        self._model.rollback(shared)
        del self._cached[shared:]
        return list(tokens[shared:])
