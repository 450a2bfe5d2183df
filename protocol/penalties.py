"""Logit bias and penalties: how the tokens before a position change its logits, the same on both ends.

For a token with the logit l, in this order:

1. logit bias b: l + b;
2. repetition penalty r, if the token is in the prompt or the answer (arXiv:1909.05858): l / r if l > 0, else l · r;
3. presence penalty p and frequency penalty f, if it is c > 0 times in the answer: l − p − f · c.

All in float32. Only some tokens change: ``Penalties`` names them, so that a model's
device gathers and scatters few logits.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from protocol.messages import Sampling

Logits: TypeAlias = npt.NDArray[np.float32]


class Penalties:
    """The changes of the logits at the position after some tokens, and after each drafted token that follows them.

    Attributes:
        token_ids: the tokens whose logits change at any of these positions, int64 [m].

    Args:
        sampling: whose logit bias and penalties apply.
        tokens: before the first position, the prompt included.
        answer_start: where the answer begins among them.
        drafted: the drafted tokens between the positions.
    """

    def __init__(
        self, sampling: Sampling, tokens: Sequence[int], answer_start: int, drafted: Sequence[int] = ()
    ) -> None:
        self._sampling = sampling
        before = np.asarray(tokens[0 if sampling.repetition_penalty != 1 else answer_start :], np.int64)
        after = np.asarray(drafted, np.int64)
        biased = np.array([token_id for token_id, _ in sampling.logit_bias], np.int64)
        self.token_ids = np.unique(np.concatenate([before, after, biased]))
        self._bias = np.zeros(len(self.token_ids), np.float32)
        self._bias[np.searchsorted(self.token_ids, biased)] = [bias for _, bias in sampling.logit_bias]
        answer = np.asarray(tokens[answer_start:], np.int64)
        self._in_answer = self._counts(answer, after)
        self._seen = self._counts(before, after) > 0

    def apply(self, logits: Logits) -> Logits:
        """The changed logits.

        Args:
            logits: of ``token_ids``, [len(drafted) + 1, m]: a row for each position.
        """
        sampling, changed = self._sampling, logits + self._bias
        repetition = np.float32(sampling.repetition_penalty)
        changed = np.where(self._seen, np.where(changed > 0, changed / repetition, changed * repetition), changed)
        presence, frequency = np.float32(sampling.presence_penalty), np.float32(sampling.frequency_penalty)
        penalties = presence * (self._in_answer > 0) + frequency * self._in_answer
        return changed - penalties.astype(np.float32)

    def _counts(self, before: npt.NDArray[np.int64], drafted: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """How often each of ``token_ids`` is before each position: [len(drafted) + 1, m]."""
        counts = np.zeros((len(drafted) + 1, len(self.token_ids)), np.int64)
        np.add.at(counts[0], np.searchsorted(self.token_ids, before), 1)
        counts[np.arange(1, len(drafted) + 1), np.searchsorted(self.token_ids, drafted)] = 1
        return counts.cumsum(axis=0)
