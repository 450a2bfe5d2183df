"""Drafting: the draft model proposes the next few tokens.

The drafter keeps the draft model's KV cache in step with the committed tokens: it
rolls back to the common prefix and runs the rest. Knows no link.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from common.common_prefix import common_prefix
from common.grammar import Grammar
from device.drafting.draft_model import Logits, SequenceModel
from device.drafting.logits_processing import process_logits
from device.drafting.prompt_lookup import Match
from device.drafting.sampling import coupled_token, full_distribution, sparse_distribution
from device.settings import UplinkSettings
from protocol.errors import NonFiniteError
from protocol.messages import DraftDistribution, Mode, Sampling
from protocol.randomness import Stream, random_bits

_CHUNK = 64
"""Most tokens of a forward pass, so that a long prefill can be cancelled."""


@dataclass(frozen=True, slots=True)
class DraftedToken:
    """A drafted token.

    Attributes:
        token_id: its id.
        margin: the gap between the two highest scores; None where the token was sampled from its distribution.
        distribution: what it was sampled from, in modes that send it.
        match: that it followed, if prompt lookup proposed it; None for a token of the draft model.
    """

    token_id: int
    margin: float | None
    distribution: DraftDistribution | None = None
    match: Match | None = None

    @property
    def evidence(self) -> float | Match | None:
        """What tells its acceptance: its match or its margin."""
        return self.match or self.margin


@dataclass(frozen=True)
class DraftResult:
    """The ids of drafted tokens and, in modes that send them, the distributions they were sampled from."""

    token_ids: tuple[int, ...]
    distributions: tuple[DraftDistribution, ...]

    @classmethod
    def of(cls, tokens: Sequence[DraftedToken]) -> Self:
        """The parts of ``tokens``."""
        return cls(
            tuple(token.token_id for token in tokens),
            tuple(token.distribution for token in tokens if token.distribution is not None),
        )


class Drafter:
    """Drafts the continuation of a sequence.

    Attributes:
        sampling: how the target is sampled; may change between two answers.
        answer_start: where the answer begins in the sequence.
        grammar: that the answer follows; None for none.

    Args:
        model: the draft model, whose KV cache nothing else may use; drafting begins with what it was forked with.
        mode: what is sent for each token.
        sampling: how the target is sampled.
        uplink: how much of each distribution is sent in modes ``topk`` and ``topp``.
        vocab_size: of the target, whose first tokens the draft model knows; None for the draft model's own.
        stop_ids: the model's, which end an answer with those of ``sampling``; None for the draft model's own.
        before_pass: called before each forward pass; what it raises ends the draft, and the KV cache stays valid.
    """

    def __init__(
        self,
        model: SequenceModel,
        mode: Mode,
        sampling: Sampling,
        uplink: UplinkSettings,
        vocab_size: int | None = None,
        stop_ids: frozenset[int] | None = None,
        before_pass: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self.sampling = sampling
        self.answer_start = 0
        self.grammar: Grammar | None = None
        self._missing = (vocab_size or model.manifest.vocab_size) - model.manifest.vocab_size
        self._uplink = None if mode is Mode.FULL else uplink
        self._ids_alone = mode.sends_ids_alone or mode is Mode.TARGET
        self._model_stop_ids = frozenset(model.manifest.stop_ids) if stop_ids is None else stop_ids
        self._before_pass = before_pass
        model.rollback(model.forked_length)
        self._pending: list[int] = []
        self._logits: Logits = np.empty(0, np.float32)  # after all tokens that have run

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Prepare for the prompt of the next answer."""
        self._model.begin(prompt_ids)
        self._pending = []

    def room(self, tokens: Sequence[int]) -> int:
        """How many tokens fit the draft model's context after ``tokens``."""
        return self._model.room(tokens)

    @property
    def context_length(self) -> int:
        """Of the draft model."""
        return self._model.manifest.context_length

    def backlog(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens`` without the last are not in the KV cache."""
        return max(0, len(tokens) - 1 - common_prefix(self._model.token_ids, tokens[:-1]))

    def prefill(self, tokens: Sequence[int], most: int | None = None) -> None:
        """Run all but the last of ``tokens``, or the next ``most`` of them, so that the first draft starts at once."""
        self._pending = self._rollback(tokens)[:-1][:most]
        if self._pending:
            self._run()

    def draft(self, tokens: Sequence[int], draft_len: int) -> DraftResult:
        """Draft up to ``draft_len`` tokens that follow ``tokens``; ends after a stop id."""
        self.follow(tokens)
        drafted: list[DraftedToken] = []
        while len(drafted) < draft_len:
            drafted.append(self.draft_token())
            if drafted[-1].token_id in self.stop_ids:
                break
        return DraftResult.of(drafted)

    def follow(self, tokens: Sequence[int]) -> None:
        """Draft what follows ``tokens`` from now on."""
        self._pending = self._rollback(tokens)

    def draft_token(self, index: int | None = None) -> DraftedToken:
        """Draft the token that follows all so far; in block verification ``index`` is that in its Draft."""
        position = self._model.length + len(self._pending)
        logits = self._next_logits()
        if self._ids_alone:
            drafted = DraftedToken(*coupled_token(logits, self.sampling, position))
        else:
            margin = coupled_token(logits, self.sampling, position)[1] if self.sampling.greedy else None
            distribution = self._distribution(logits)
            first_drafted = None if index is None else position - index
            token_id = distribution.sample(random_bits(self.sampling.seed, position, Stream.DRAFT, first_drafted))
            drafted = DraftedToken(token_id, margin, distribution)
        return self._take(drafted)

    def guess_token(self) -> DraftedToken:
        """The likeliest token that follows all so far, with the noise of mode ``coupled``; it is not sampled."""
        sampling = self.sampling if self._ids_alone else Sampling()
        position = self._model.length + len(self._pending)
        return self._take(DraftedToken(*coupled_token(self._next_logits(), sampling, position)))

    def cache_last_token(self) -> None:
        """Run the last drafted token, so that the next draft needs one step less if it is accepted."""
        if self._pending:
            self._run()

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer."""
        return self.sampling.stop_ids(self._model_stop_ids)

    def _next_logits(self) -> Logits:
        """The logits that the next token is drafted from, without a forward pass where the grammar forces it."""
        cached, start = self._model.token_ids, self.answer_start
        answer = [*cached[start:], *self._pending[max(0, start - len(cached)) :]]
        grammar = self.grammar if self.grammar and self.grammar.follow(answer) else None
        forced = grammar.forced() if grammar else None
        if forced is not None:
            logits = np.full(self._model.manifest.vocab_size + self._missing, -np.inf, np.float32)
            logits[forced] = 0
            return logits
        allowed = grammar.allowed() if grammar else None
        logits = self._run()
        return process_logits(logits, self.sampling, self._model.token_ids, self.answer_start, self.stop_ids, allowed)

    def _run(self) -> Logits:
        """The logits after all tokens so far; runs those that are pending."""
        if not self._pending:
            return self._logits
        while self._pending:
            self._before_pass()
            chunk = self._pending[:_CHUNK]
            logits = self._model.forward(chunk)
            del self._pending[:_CHUNK]
        if not np.isfinite(logits.max()):
            count = self._model.length
            raise NonFiniteError(f"the draft model's logits are NaN or infinite after {count} tokens; export it again")
        self._logits = np.pad(logits, (0, self._missing), constant_values=-np.inf) if self._missing else logits
        return self._logits

    def _take(self, drafted: DraftedToken) -> DraftedToken:
        if drafted.token_id not in self.stop_ids:
            self._pending.append(drafted.token_id)
        return drafted

    def _distribution(self, logits: Logits) -> DraftDistribution:
        if self._uplink is None:
            return full_distribution(logits, self.sampling)
        return sparse_distribution(logits, self.sampling, self._uplink)

    def _rollback(self, tokens: Sequence[int]) -> list[int]:
        """Shorten the KV cache to the prefix shared with ``tokens``; return the tokens to run, at least the last."""
        shared = common_prefix(self._model.token_ids, tokens[:-1])
        self._model.rollback(shared)
        return list(tokens[shared:])
