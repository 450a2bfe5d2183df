"""Drafting: the draft model proposes the next few tokens.

The drafter keeps the draft model's KV cache in step with the committed tokens: it
rolls back to the common prefix and runs the rest. Knows no link.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from device.common_prefix import common_prefix
from device.draft_model import DraftModel, Logits
from device.sampling import coupled_token, full_distribution, sparse_distribution
from device.settings import UplinkSettings
from protocol.errors import NonFiniteError
from protocol.messages import DraftDistribution, Mode, Sampling
from protocol.randomness import Stream, random_bits

_CHUNK = 64
"""Most tokens of a forward pass, so that a long prefill can be cancelled."""
ShouldContinue: TypeAlias = Callable[[Sequence[float | None]], bool]
"""Takes the margins of the tokens drafted so far; says whether to draft another."""


@dataclass(frozen=True)
class DraftResult:
    """Drafted tokens and, in modes that send them, the distributions they were sampled from.

    ``margins`` holds for each token the gap between the two highest scores, or None
    where the token was sampled from its distribution.
    """

    token_ids: tuple[int, ...]
    distributions: tuple[DraftDistribution, ...]
    margins: tuple[float | None, ...]


class Drafter:
    """Drafts the continuation of a sequence.

    Attributes:
        sampling: how the target is sampled; may change between two answers.

    Args:
        model: the draft model, whose KV cache nothing else may use; drafting begins with what it was forked with.
        mode: what is sent for each token.
        sampling: how the target is sampled.
        uplink: how much of each distribution is sent in modes ``topk`` and ``topp``.
        vocab_size: of the target, whose first tokens the draft model knows; None for the draft model's own.
        stop_ids: the ids that end an answer; None for the draft model's own.
        before_pass: called before each forward pass; what it raises ends the draft, and the KV cache stays valid.
    """

    def __init__(
        self,
        model: DraftModel,
        mode: Mode,
        sampling: Sampling,
        uplink: UplinkSettings,
        vocab_size: int | None = None,
        stop_ids: frozenset[int] | None = None,
        before_pass: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self.sampling = sampling
        self._missing = (vocab_size or model.manifest.vocab_size) - model.manifest.vocab_size
        self._uplink = None if mode is Mode.FULL else uplink
        self._ids_alone = mode.sends_ids_alone
        self._stop_ids = frozenset(model.manifest.stop_ids) if stop_ids is None else stop_ids
        self._before_pass = before_pass
        model.rollback(model.forked_length)
        self._pending: list[int] = []

    def prefill(self, tokens: Sequence[int]) -> None:
        """Run all but the last of ``tokens``, so that the first draft starts at once."""
        self._pending = self._rollback(tokens)[:-1]
        if self._pending:
            self._run()

    def draft(
        self, tokens: Sequence[int], draft_len: int, should_continue: ShouldContinue | None = None
    ) -> DraftResult:
        """Draft up to ``draft_len`` tokens that follow ``tokens``; ends after a stop id.

        ``should_continue`` is asked before each token.
        """
        self._pending = self._rollback(tokens)
        drafted: list[int] = []
        margins: list[float | None] = []
        distributions: list[DraftDistribution] = []
        while len(drafted) < draft_len and (should_continue is None or should_continue(margins)):
            logits = self._run()
            position = len(tokens) + len(drafted)
            margin = None
            if self._ids_alone or self.sampling.greedy:
                token_id, margin = coupled_token(logits, self.sampling, position)
            if not self._ids_alone:
                distribution = self._distribution(logits)
                token_id = distribution.sample(random_bits(self.sampling.seed, position, Stream.DRAFT))
                distributions.append(distribution)
            drafted.append(token_id)
            margins.append(margin)
            if token_id in self._stop_ids:
                break
            self._pending = [token_id]
        return DraftResult(tuple(drafted), tuple(distributions), tuple(margins))

    def cache_last_token(self) -> None:
        """Run the last drafted token, so that the next draft needs one step less if it is accepted."""
        if self._pending:
            self._run()

    def _run(self) -> Logits:
        while self._pending:
            self._before_pass()
            chunk = self._pending[:_CHUNK]
            logits = self._model.forward(chunk)
            del self._pending[:_CHUNK]
        if not np.isfinite(logits.max()):
            count = self._model.length
            raise NonFiniteError(f"the draft model's logits are NaN or infinite after {count} tokens; export it again")
        return np.pad(logits, (0, self._missing), constant_values=-np.inf) if self._missing else logits

    def _distribution(self, logits: Logits) -> DraftDistribution:
        if self._uplink is None:
            return full_distribution(logits, self.sampling)
        return sparse_distribution(logits, self.sampling, self._uplink)

    def _rollback(self, tokens: Sequence[int]) -> list[int]:
        """Shorten the KV cache to the prefix shared with ``tokens``; return the tokens to run, at least the last."""
        shared = common_prefix(self._model.token_ids, tokens[:-1])
        self._model.rollback(shared)
        return list(tokens[shared:])
