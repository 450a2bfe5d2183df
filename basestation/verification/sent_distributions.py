"""What devices sent of their draft distributions, for the rows of logits that verify them.

Each round has a row for each drafted token and one for the token after them, which has no distribution.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from basestation.target.host_transfer import HostTransfer
from protocol.full_distribution import FullDistribution
from protocol.messages import DraftDistribution
from protocol.sparse import SparseDistribution


class SentDistributions:
    """The entries of sparse distributions, concatenated, and full ones in FP16.

    Args:
        drafted: the draft_len tokens of each round.
        distributions: of each of them.
        vocab_size: V.
        transfer: of the pass.

    Attributes:
        drafted_probs: Q of the drafted token of each row, float64 [n]; 0 in the last row of a round.
    """

    def __init__(
        self,
        drafted: Sequence[Sequence[int]],
        distributions: Sequence[Sequence[DraftDistribution]],
        vocab_size: int,
        transfer: HostTransfer,
    ) -> None:
        token_ids, sent = np.fromiter(chain.from_iterable(drafted), np.int64), list(chain.from_iterable(distributions))
        counts = np.array([len(one) + 1 for one in drafted])
        round_indices = np.repeat(np.arange(len(counts)), counts - 1)
        rows = np.arange(len(round_indices)) + round_indices  # each earlier round has one row more than drafted tokens
        sparse = [one for one in sent if isinstance(one, SparseDistribution)]
        full = [one for one in sent if isinstance(one, FullDistribution)]
        is_full = np.array([isinstance(one, FullDistribution) for one in sent], bool)
        entries = np.zeros(counts.sum(), np.int64)
        entries[rows[~is_full]] = [len(one) for one in sparse]
        support = _concatenate([one.support for one in sparse], np.int64)
        probs = _concatenate([one.probs for one in sparse], np.float64)
        drafted_probs = np.zeros(counts.sum())
        entry_rows = np.repeat(np.arange(len(entries)), entries)
        known = entry_rows * vocab_size + support
        drafted_probs[rows[~is_full]] = _look_up(known, probs, (rows * vocab_size + token_ids)[~is_full])
        drafted_probs[rows[is_full]] = [
            one.probability(token_id) for one, token_id in zip(full, token_ids[is_full].tolist(), strict=True)
        ]
        self.drafted_probs = transfer.add(drafted_probs)
        self._entries, self._entry_rows = transfer.add(entries), transfer.add(entry_rows)
        self._entry_rounds = transfer.add(np.repeat(np.repeat(np.arange(len(counts)), counts), entries))
        self._support, self._probs = transfer.add(support), transfer.add(probs)
        self._full = list(rows[is_full].tolist())
        if full:
            self._full_rows = transfer.add(rows[is_full])
            self._fp16 = transfer.add(np.stack([one.fp16 for one in full]))

    def overlap(self, weights: Tensor, scales: Tensor) -> Tensor:
        """Σ_x min(scale · weight(x), Q(x)) of each row of weights [n, V], float64 [n]; 0 without a Q."""
        rows = self._entry_rows.tensor
        common = torch.minimum(weights[rows, self._support.tensor] * scales[rows], self._probs.tensor)
        overlaps = torch.segment_reduce(common, "sum", lengths=self._entries.tensor, unsafe=True)
        for index, row in enumerate(self._full):
            draft_probs = self._fp16.tensor[index].float()
            draft_probs /= draft_probs.sum(dtype=torch.float64)
            overlaps[row] = torch.minimum(weights[row] * scales[row], draft_probs).sum(dtype=torch.float64)
        return overlaps

    def subtract_from(self, target_probs: Tensor, ends: Tensor) -> None:
        """Turn target_probs [rounds, V], P of the rows ``ends``, into max(0, P − Q), in place."""
        self._subtract_sparse(target_probs, ends)
        if self._full:
            self._subtract_full(target_probs, ends)
        target_probs.clamp_(min=0)

    def _subtract_sparse(self, target_probs: Tensor, ends: Tensor) -> None:
        round_indices = self._entry_rounds.tensor
        draft_probs = torch.where(ends[round_indices] == self._entry_rows.tensor, self._probs.tensor, 0.0)
        flat_indices = round_indices * target_probs.shape[1] + self._support.tensor
        target_probs.view(-1).index_add_(0, flat_indices, draft_probs, alpha=-1)

    def _subtract_full(self, target_probs: Tensor, ends: Tensor) -> None:
        """Only the rows ``ends`` are converted to float64: all rows would need four times the memory of the Drafts."""
        rows = self._full_rows.tensor
        indices = torch.searchsorted(rows, ends).clamp_(max=len(rows) - 1)
        draft_probs = self._fp16.tensor[indices].double()
        draft_probs /= draft_probs.sum(dim=-1, keepdim=True)
        target_probs -= draft_probs * (rows[indices] == ends)[:, None]


def _look_up(
    known: npt.NDArray[np.int64], probs: npt.NDArray[np.float64], keys: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """The entries of ``probs`` whose ascending keys are ``known``, for the ``keys`` [n]; 0 for others."""
    if not len(known):
        return np.zeros(len(keys))
    indices = known.searchsorted(keys).clip(max=len(known) - 1)
    return np.where(known[indices] == keys, probs[indices], 0.0)


def _concatenate(arrays: Sequence[npt.NDArray[Any]], dtype: type[Any]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)
