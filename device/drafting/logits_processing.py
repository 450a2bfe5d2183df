"""What the sampling settings do to the draft model's logits before temperature, top-k and top-p, as at the target."""

from collections.abc import Sequence
from math import log

import numpy as np

from common.grammar import Mask
from device.drafting.draft_model import Logits
from protocol.messages import Sampling
from protocol.penalties import Penalties


def process_logits(
    logits: Logits,
    sampling: Sampling,
    tokens: Sequence[int],
    answer_start: int,
    stop_ids: frozenset[int],
    allowed: Mask | None = None,
) -> Logits:
    """The logits that the next token is drafted from; ``logits`` themselves where the settings change nothing.

    Args:
        logits: of the draft model after ``tokens``, float32 [V].
        sampling: of the session.
        tokens: committed and drafted so far, the prompt included.
        answer_start: where the answer begins among them.
        stop_ids: that end the answer.
        allowed: by the grammar, bool, of the draft model's tokens; None where there is none.
    """
    if not sampling.changes_logits:
        return logits
    logits = logits.copy()
    if sampling.penalizes:
        penalties = Penalties(sampling, tokens, answer_start)
        logits[penalties.token_ids] = penalties.apply(logits[None, penalties.token_ids])[0]
    if allowed is not None:
        logits = _masked(logits, allowed)
    if len(tokens) - answer_start < sampling.min_tokens:
        logits[sorted(stop_ids)] = -np.inf
    if sampling.min_p and not sampling.greedy:
        logits[logits < logits.max() + log(sampling.min_p)] = -np.inf
    return logits


def _masked(logits: Logits, allowed: Mask) -> Logits:
    """The logits without the tokens that are not allowed; all of them where the draft model has none of the others."""
    missing = len(logits) - len(allowed)
    masked = np.where(np.pad(allowed, (0, missing)), logits, np.float32(-np.inf))
    return masked if masked.max() > -np.inf else logits
