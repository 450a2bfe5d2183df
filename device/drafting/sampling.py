"""From the draft model's logits to the distribution that a draft token is sampled from.

Truncate, quantise, then sample: what is sent is what was sampled from (invariant 1).
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from device.drafting.draft_model import Logits
from device.settings import UplinkSettings
from protocol.coupling import PositionNoise, argmax_and_margin
from protocol.full_distribution import FullDistribution
from protocol.messages import DraftDistribution, Sampling
from protocol.sparse import SparseDistribution

COUPLED_CANDIDATES = 1024
Ids: TypeAlias = npt.NDArray[np.int64]
Probs: TypeAlias = npt.NDArray[np.float64]


def sparse_distribution(logits: Logits, sampling: Sampling, uplink: UplinkSettings) -> SparseDistribution:
    """The top-K or top-p entries at the user's temperature, top-k and top-p, quantised as they are sent.

    Any distribution is allowed here, since verification corrects for it; this one is
    as close to the target's as the entries permit. The user's top-p is applied to the
    kept entries where ``uplink.p`` is 1.

    Args:
        logits: float32 [V].
        sampling: how the target is sampled.
        uplink: how much is sent.
    """
    support, probs = _top_probs(logits, sampling, uplink.k if uplink.p == 1 else len(logits))
    if uplink.p < 1:
        support, probs = _nucleus(support, probs, uplink.p, uplink.k)
    return SparseDistribution.quantize(len(logits), support, probs, uplink.steps)


def full_distribution(logits: Logits, sampling: Sampling) -> FullDistribution:
    """All V probabilities at the user's temperature, top-k and top-p, in FP16."""
    support, probs = _top_probs(logits, sampling, len(logits))
    dense = np.zeros(len(logits))
    dense[support] = probs
    return FullDistribution.quantize(dense)


def certain_distribution(token_id: int, vocab_size: int, uplink: UplinkSettings | None) -> DraftDistribution:
    """The distribution of a token that was not sampled, but chosen: a sparse one, or without ``uplink`` a full one."""
    if uplink is not None:
        return SparseDistribution.quantize(vocab_size, np.array([token_id]), np.ones(1), uplink.steps)
    dense = np.zeros(vocab_size)
    dense[token_id] = 1
    return FullDistribution.quantize(dense)


def coupled_token(logits: Logits, sampling: Sampling, position: int) -> tuple[int, float]:
    """The argmax of the draft model's scores plus the shared noise of a position, and its margin.

    With top-k or top-p only the ``COUPLED_CANDIDATES`` most likely tokens are considered.
    """
    if sampling.greedy:
        return argmax_and_margin(logits)
    noise = PositionNoise(sampling.seed, position, len(logits))
    if sampling.top_k == 0 and sampling.top_p == 1:
        return noise.choose(logits, sampling.temperature)
    support, probs = _top_probs(logits, sampling, COUPLED_CANDIDATES)
    support, probs = support[probs > 0], probs[probs > 0]
    index, margin = argmax_and_margin(np.log(probs) + noise.of(support))
    return int(support[index]), margin


def _top_probs(logits: Logits, sampling: Sampling, most: int) -> tuple[Ids, Probs]:
    """The ``most`` most likely tokens that the user's settings keep, renormalised; none whose logit is -inf."""
    if sampling.greedy:
        return logits.argmax(axis=0, keepdims=True), np.ones(1)
    support = np.flatnonzero(logits > -np.inf)
    count = min(most, sampling.top_k or len(support), len(support))
    if count < len(support):  # many equal logits would slow argpartition down
        support = support[np.argpartition(logits[support], -count)[-count:]]
    scores = logits[support].astype(np.float64) / sampling.temperature
    weights = np.exp(scores - scores.max())
    probs = weights / weights.sum()
    if sampling.top_p < 1:
        support, probs = _nucleus(support, probs, sampling.top_p, count)
    return support, probs


def _nucleus(support: Ids, probs: Probs, mass: float, most: int) -> tuple[Ids, Probs]:
    """The smallest set of most likely tokens whose probability reaches ``mass``, or the ``most`` most likely."""
    largest = np.argpartition(probs, -most)[-most:] if most < len(probs) else np.arange(len(probs))
    order = largest[np.argsort(-probs[largest])]
    before = np.cumsum(probs[order]) - probs[order]
    kept = order[before < mass]
    return support[kept], probs[kept] / probs[kept].sum()
