"""The target's own tokens and distributions, from its logits and the sampling settings of each row.

All rows of a pass are sampled at once, as tensors on the model's device. Knows tensors and the seed; not drafts.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from basestation.target.host_transfer import HostTransfer
from basestation.verification.coupled_sampling import coupled_choice
from protocol.coupling import noise_keys
from protocol.messages import Sampling

_TOP_P_NUMBERS = 2**22
"""Of the scores that top-p sorts at a time: in float64, with copies, about 130 MiB."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row of logits is sampled, and for which ``position`` of its sequence."""

    sampling: Sampling
    position: int


def sample_target_tokens(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Sample the target's own tokens, of any number of sessions at once: int64 [n].

    The argmax at temperature 0; otherwise the argmax with the shared noise added
    (``protocol.coupling``), a function of target, settings and seed alone.

    Args:
        logits: [n, V].
        rows: how to sample each row.
    """
    return TargetSampling(rows, HostTransfer(logits.device)).sample(logits)


class TargetSampling:
    """How to sample the target's tokens of some rows, in groups with the same settings."""

    def __init__(self, rows: Sequence[SamplingRow], transfer: HostTransfer) -> None:
        groups: dict[Hashable, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(_group_key(row.sampling), []).append(index)
        self._groups = [_SamplingGroup([rows[index] for index in indices], transfer) for indices in groups.values()]
        self._indices = [transfer.add(np.array(indices)) for indices in groups.values()] if len(groups) > 1 else []

    def sample(self, logits: Tensor) -> Tensor:
        """The tokens of the rows of logits [n, V], int64 [n]."""
        if not self._indices:
            return self._groups[0].sample(logits)
        token_ids = logits.new_empty(len(logits), dtype=torch.int64)
        for group, indices in zip(self._groups, self._indices, strict=True):
            token_ids[indices.tensor] = group.sample(logits[indices.tensor])
        return token_ids


def _group_key(sampling: Sampling) -> Hashable:
    """Rows with the same key are sampled together; without top-k and top-p their temperatures may differ."""
    if sampling.greedy or (sampling.top_k == 0 and sampling.top_p == 1):
        return sampling.greedy
    return sampling.temperature, sampling.top_k, sampling.top_p


class _SamplingGroup:
    """Rows with the same ``_group_key``."""

    def __init__(self, rows: Sequence[SamplingRow], transfer: HostTransfer) -> None:
        self._first = first = rows[0].sampling
        self._warps = bool(first.top_k) or first.top_p < 1
        if first.greedy:
            return
        temperatures = np.array([1.0 if self._warps else row.sampling.temperature for row in rows])
        self._temperatures = transfer.add(temperatures)
        self._keys = transfer.add(noise_keys([row.sampling.seed for row in rows], [row.position for row in rows]))

    def sample(self, logits: Tensor) -> Tensor:
        """The tokens of the rows of logits [n, V], int64 [n]."""
        first = self._first
        if first.greedy:
            return logits.argmax(dim=-1)
        if self._warps:
            logits = warp_scores(logits / first.temperature, first.top_k, first.top_p)
        return coupled_choice(logits, self._temperatures.tensor, self._keys.tensor)


def target_weights(logits: Tensor, samplings: Sequence[Sampling], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The target's distributions, unnormalised: a token's probability is its weight divided by its row's total.

    The weight of the most likely token is 1.

    Args:
        logits: [n, V], float32.
        samplings: temperature above 0, top-k and top-p of each group of rows.
        counts: rows in each group.

    Returns:
        The weights, float32 [n, V], and the totals, float64 [n, 1].
    """
    return TargetWeights(samplings, counts, HostTransfer(logits.device)).of(logits)


class TargetWeights:
    """The settings of ``target_weights``."""

    def __init__(self, samplings: Sequence[Sampling], counts: Sequence[int], transfer: HostTransfer) -> None:
        self._temperatures = transfer.add(
            np.repeat(np.array([one.temperature for one in samplings], np.float32), counts)
        )
        limits = [(one.top_k, one.top_p) for one in samplings]
        self._limited = {
            limit: transfer.add(np.flatnonzero(np.repeat([one == limit for one in limits], counts)))
            for limit in set(limits) - {(0, 1.0)}
        }

    def of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See ``target_weights``."""
        scores = logits - logits.amax(dim=-1, keepdim=True)
        scores /= self._temperatures.tensor[:, None]
        for limit, rows in self._limited.items():
            scores[rows.tensor] = warp_scores(scores[rows.tensor], *limit)
        weights = scores.exp_()
        return weights, weights.sum(dim=-1, keepdim=True, dtype=torch.float64)


def warp_scores(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Apply top-k, then top-p: ``scores`` [n, V] with -inf for the tokens that are filtered out.

    Top-k keeps ties with the k-th token; top-p keeps the smallest set of most likely
    tokens whose probabilities sum to p or more. Scores are logits divided by the temperature.
    """
    if 0 < top_k < scores.shape[-1]:
        smallest = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if top_p < 1:
        rows = max(1, _TOP_P_NUMBERS // scores.shape[-1])
        scores = torch.cat([_keep_top_p(part, top_p) for part in torch.split(scores, rows)])
    return scores


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    probs = scores.softmax(dim=-1, dtype=torch.float64)
    # stable on CUDA, so that ties do not depend on the batch; a CPU sorts each row alone, and longer if stable
    ordered, order = probs.sort(dim=-1, descending=True, stable=scores.is_cuda)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    return scores.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), -torch.inf)
