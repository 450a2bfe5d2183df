"""From the logits of the draft model to the distribution a draft token is drawn from.

Sparsify, round, then sample: what is sent is what was drawn from (invariant 1).
"""

from dataclasses import dataclass
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt

from device.draft_model import Logits
from protocol.bundle import QualityFigures
from protocol.coupling import PositionNoise, argmax_and_margin
from protocol.errors import SettingsError
from protocol.messages import Mode, Sampling
from protocol.sparse import MAX_STEPS, SparseDistribution

COUPLED_CANDIDATES = 1024
_TOPK_IS_WORTH = 0.05
"""So much more must ``topk`` accept to be worth thirty times the bytes: a tenth more tokens a second, about."""
Ids: TypeAlias = npt.NDArray[np.int64]
Probs: TypeAlias = npt.NDArray[np.float64]


ENTRIES = {Mode.TOPK: 32, Mode.TOPP: 256}
"""How many entries of each distribution are sent, at most, where nothing else is asked for."""
STEPS_PER_ENTRY = {Mode.TOPK: 24, Mode.TOPP: 16}
"""Chosen by ``edgedraft-bench encodings``; a support of topp is mostly far smaller than its cap."""


@dataclass(frozen=True)
class Uplink:
    """How much of a distribution is sent.

    ``k`` entries at most; of those the likeliest that reach the probability
    ``p``; in steps of 1/``steps``.
    """

    k: int
    p: float
    steps: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise SettingsError("uplink-k", self.k, "1 and more")
        if not 0 < self.p <= 1:
            raise SettingsError("uplink-p", self.p, "above 0, up to 1 (all of the K entries)")
        if not 1 <= self.steps <= MAX_STEPS:
            raise SettingsError("uplink-steps", self.steps, f"1 to {MAX_STEPS}")

    @classmethod
    def of_mode(cls, mode: Mode, k: int, p: float, steps: int) -> Self:
        """What a mode sends; ``p`` is for ``topp`` alone, and ``steps`` 0 leaves them to the mode."""
        chosen = steps or min(STEPS_PER_ENTRY.get(mode, 1) * k, MAX_STEPS)
        return cls(k, p if mode is Mode.TOPP else 1.0, chosen)


def best_mode(quality: QualityFigures, sampling: Sampling) -> Mode:
    """What mode ``auto`` stands for.

    Above temperature 0 the one of ``coupled`` and ``topk`` that accepts more, as measured
    at the quality; what lies within ``_TOPK_IS_WORTH`` is decided by the bytes.
    """
    if sampling.greedy:
        return Mode.IDS
    gain = quality.topk_acceptance - quality.coupled_acceptance
    return Mode.TOPK if gain > _TOPK_IS_WORTH else Mode.COUPLED


def draft_distribution(logits: Logits, sampling: Sampling, uplink: Uplink) -> SparseDistribution:
    """The likeliest tokens at the user's temperature, top-k and top-p, as many as the uplink takes, rounded as sent.

    Any distribution is allowed here, since verification makes up for it; this
    one is as near to the target's as the entries permit. The user's top-p set is
    taken of the kept entries where ``uplink.p`` is 1.

    Args:
        logits: float32 [V].
        sampling: what the target is sampled with.
        uplink: how much is sent.
    """
    support, probs = _likeliest(logits, sampling, uplink.k if uplink.p == 1 else len(logits))
    if uplink.p < 1:
        support, probs = _nucleus(support, probs, uplink.p, uplink.k)
    return SparseDistribution.quantize(len(logits), support, probs, uplink.steps)


def full_distribution(logits: Logits, sampling: Sampling) -> SparseDistribution:
    """All V probabilities at the user's temperature, top-k and top-p, rounded to FP16."""
    support, probs = _likeliest(logits, sampling, len(logits))
    whole = np.zeros(len(logits))
    whole[support] = probs
    return SparseDistribution.quantize_fp16(whole)


def _likeliest(logits: Logits, sampling: Sampling, most: int) -> tuple[Ids, Probs]:
    """What the user's settings leave of the ``most`` likeliest tokens, renormalised."""
    vocab_size = len(logits)
    if sampling.greedy:
        return logits.argmax(axis=0, keepdims=True), np.ones(1)
    count = min(most, sampling.top_k or vocab_size, vocab_size)
    support = np.arange(vocab_size) if count == vocab_size else np.argpartition(logits, -count)[-count:]
    scores = logits[support].astype(np.float64) / sampling.temperature
    weights = np.exp(scores - scores.max())
    probs = weights / weights.sum()
    if sampling.top_p < 1:
        support, probs = _nucleus(support, probs, sampling.top_p, count)
    return support, probs


def coupled_token(logits: Logits, sampling: Sampling, position: int) -> tuple[int, float]:
    """The token that the draft model's scores and the shared noise of a position margin to, and its margin over the next.

    With top-k or top-p the choice is among the ``COUPLED_CANDIDATES`` likeliest tokens at most.
    """
    if sampling.greedy:
        return argmax_and_margin(logits)
    noise = PositionNoise(sampling.seed, position, len(logits))
    if sampling.top_k == 0 and sampling.top_p == 1:
        return noise.choose(logits, sampling.temperature)
    support, probs = _likeliest(logits, sampling, COUPLED_CANDIDATES)
    support, probs = support[probs > 0], probs[probs > 0]
    place, margin = argmax_and_margin(np.log(probs) + noise.of(support))
    return int(support[place]), margin


def _nucleus(support: Ids, probs: Probs, mass: float, most: int) -> tuple[Ids, Probs]:
    """The smallest set of likeliest tokens whose mass reaches ``mass``, or the ``most`` likeliest."""
    largest = np.argpartition(probs, -most)[-most:] if most < len(probs) else np.arange(len(probs))
    order = largest[np.argsort(-probs[largest])]
    before = np.cumsum(probs[order]) - probs[order]
    kept = order[before < mass]
    return support[kept], probs[kept] / probs[kept].sum()
