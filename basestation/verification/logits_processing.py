"""What a session's sampling settings do to the target's logits before temperature, top-k and top-p.

Each row follows the committed tokens and the drafted ones before it, so that the
result does not depend on how many tokens a round verifies.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import log

import numpy as np
import torch
from torch import Tensor

from common.grammar import Grammar
from protocol.messages import Sampling
from protocol.penalties import Penalties

_GRAMMAR_SECONDS = 0.1
"""CPU time of the masks of one forward pass."""


@dataclass(frozen=True, slots=True)
class AnswerSoFar:
    """What the next token depends on besides the target's logits.

    Attributes:
        tokens: the committed tokens, the prompt included.
        start: where the answer begins among them.
        stop_ids: that end the answer.
        grammar: of the session, if it has one; moves along the drafted tokens.
    """

    tokens: Sequence[int]
    start: int
    stop_ids: frozenset[int]
    grammar: Grammar | None = None


class MaskTime:
    """The CPU time for the masks of one forward pass.

    One half is shared equally; the other half goes to the first rounds that need more.

    Args:
        rounds: with a grammar.
    """

    def __init__(self, rounds: int) -> None:
        self._left = _GRAMMAR_SECONDS
        self._share = _GRAMMAR_SECONDS / 2 / max(1, rounds)
        self._rounds = rounds

    @contextmanager
    def of_next(self) -> Iterator[float]:
        """The seconds that the next round may take; then counts what it took."""
        self._rounds -= 1
        began = time.thread_time()
        yield max(self._share, self._left - self._rounds * self._share)
        self._left -= time.thread_time() - began


@torch.inference_mode()
def process_logits(
    logits: Tensor, sampling: Sampling, answer: AnswerSoFar, drafted: Sequence[int], mask_time: MaskTime
) -> None:
    """Change the logits of one round in place.

    Args:
        logits: [len(drafted) + 1, V], float32.
        sampling: of the session.
        answer: before the first row.
        drafted: the token between each two rows.
        mask_time: of the forward pass.
    """
    if sampling.penalizes:
        penalties = Penalties(sampling, answer.tokens, answer.start, drafted)
        columns = torch.from_numpy(penalties.token_ids).to(logits.device)
        changed = penalties.apply(logits[:, columns].cpu().numpy())
        logits[:, columns] = torch.from_numpy(changed).to(logits.device)
    if answer.grammar is not None:
        tokens = answer.tokens[answer.start :]
        with mask_time.of_next() as seconds:
            _apply_grammar(logits, answer.grammar, tokens, drafted, seconds)
    too_short = sampling.min_tokens - (len(answer.tokens) - answer.start)
    if too_short > 0:
        logits[:too_short, sorted(answer.stop_ids)] = -torch.inf
    if sampling.min_p and not sampling.greedy:
        least = logits.amax(dim=-1, keepdim=True) + log(sampling.min_p)
        logits.masked_fill_(logits < least, -torch.inf)


def _apply_grammar(
    logits: Tensor, grammar: Grammar, tokens: Sequence[int], drafted: Sequence[int], seconds: float
) -> None:
    """Exclude the tokens that the grammar does not allow, up to the first drafted one that it does not allow itself."""
    excluded = np.zeros(logits.shape, np.bool_)
    follows = grammar.follow(tokens, seconds)
    for row, token_id in zip(excluded, (*drafted, None), strict=True):
        if not follows:
            break
        np.logical_not(grammar.allowed(), out=row)
        follows = token_id is not None and grammar.advance(token_id)
    logits.masked_fill_(torch.from_numpy(excluded).to(logits.device), -torch.inf)
