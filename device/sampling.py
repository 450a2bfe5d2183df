"""From the logits of the draft model to the distribution a draft token is drawn from.

Sparsify, round, then sample: what is sent is what was drawn from (invariant 1).
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from device.draft_model import Logits
from protocol.coupling import PositionNoise
from protocol.messages import Sampling
from protocol.sparse import SparseDistribution

COUPLED_CANDIDATES = 1024
Ids: TypeAlias = npt.NDArray[np.int64]
Probs: TypeAlias = npt.NDArray[np.float64]


def draft_distribution(logits: Logits, sampling: Sampling, uplink_k: int) -> SparseDistribution:
    """The ``uplink_k`` likeliest tokens at the user's temperature, top-k and top-p, rounded as sent.

    Any distribution is allowed here, since verification makes up for it; this
    one is as near to the target's as the K entries permit. The top-p set is
    taken of the kept entries.

    Args:
        logits: float32 [V].
        sampling: what the target is sampled with.
        uplink_k: entries kept, 1 to V.
    """
    vocab_size = len(logits)
    if sampling.greedy:
        return SparseDistribution.round_off(vocab_size, logits.argmax(axis=0, keepdims=True), np.ones(1))
    count = min(uplink_k, sampling.top_k or vocab_size, vocab_size)
    support = np.arange(vocab_size) if count == vocab_size else np.argpartition(logits, -count)[-count:]
    scores = logits[support].astype(np.float64) / sampling.temperature
    weights = np.exp(scores - scores.max())
    probs = weights / weights.sum()
    if sampling.top_p < 1:
        support, probs = _nucleus(support, probs, sampling.top_p)
    return SparseDistribution.round_off(vocab_size, support, probs)


def coupled_guess(logits: Logits, sampling: Sampling, position: int) -> int:
    """The token that the draft model's scores and the shared noise of a position lead to.

    With top-k or top-p the choice is among the ``COUPLED_CANDIDATES`` likeliest tokens at most.
    """
    if sampling.greedy:
        return int(logits.argmax())
    noise = PositionNoise(sampling.seed, position, len(logits))
    if sampling.top_k == 0 and sampling.top_p == 1:
        return noise.argmax(logits / np.float32(sampling.temperature))
    candidates = draft_distribution(logits, sampling, COUPLED_CANDIDATES)
    scores = np.log(candidates.probs) + noise.of(candidates.support)
    return int(candidates.support[scores.argmax()])


def _nucleus(support: Ids, probs: Probs, mass: float) -> tuple[Ids, Probs]:
    """The smallest set of likeliest tokens whose mass reaches ``mass``."""
    order = np.argsort(-probs)
    before = np.cumsum(probs[order]) - probs[order]
    kept = order[before < mass]
    return support[kept], probs[kept] / probs[kept].sum()
