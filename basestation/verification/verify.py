"""Speculative verification: which drafted tokens are accepted, and the token that follows them.

For drafted tokens x_i ~ Q_i and the target's distributions P_i (arXiv:2509.04576,
after Leviathan et al. 2023):

- x_i is accepted if u_i · Q_i(x_i) < P_i(x_i), u_i uniform in [0, 1);
- at the first rejection the *recovered* token is sampled from the residual norm(max(0, P_i − Q_i));
- after full acceptance the *bonus* token is sampled from P_{γ+1}.

The emitted tokens are then distributed as the target's own for any Q, provided
that Q is exactly what the device sampled from (invariants 1 and 3).

All rounds of a batch are verified at once, as tensors on the model's device: each
row of logits is accepted or rejected, and a round ends at its first rejected row.
The row after the last drafted token is always rejected. Rounds of sessions with block
verification are accepted by the joint probability of their tokens instead (``block_verification.py``).

Knows tensors and the seed; not where the logits came from.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from basestation.verification.block_verification import joint_probabilities, last_accepted
from basestation.verification.coupled_sampling import coupled_choice
from basestation.verification.logits_processing import AnswerSoFar, MaskTime, process_logits
from basestation.verification.logprobs import token_logprobs
from protocol.full_distribution import FullDistribution
from protocol.logprobs import TokenLogprobs
from protocol.messages import DraftDistribution, Sampling
from protocol.randomness import Stream, uniforms
from protocol.sparse import SparseDistribution

_NO_TOKEN = -1
_TOP_P_NUMBERS = 2**22
"""Of the scores that top-p sorts at a time: in float64, with copies, about 130 MiB."""


@dataclass(frozen=True, slots=True)
class RoundToVerify:
    """A round before its verification.

    Attributes:
        sampling: how the target is sampled.
        position: of the first drafted token in the whole sequence.
        drafted: the draft_len tokens.
        distributions: what each drafted token was sampled from, for rejection sampling.
        rejection_sampling: accept by P/Q; otherwise accept what equals the target's own tokens.
        answer: so far, for sampling settings that change the logits.
        given: accept all drafted tokens.
        block_verification: with rejection sampling, accept by the joint probability of the drafted tokens.
    """

    sampling: Sampling
    position: int
    drafted: Sequence[int] = ()
    distributions: Sequence[DraftDistribution] = ()
    rejection_sampling: bool = False
    answer: AnswerSoFar | None = None
    given: bool = False
    block_verification: bool = False

    @property
    def num_logits(self) -> int:
        """Rows of logits: one per drafted token, and one for the token after them."""
        return len(self.drafted) + 1


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """The number of ``accepted`` drafted tokens, and the recovered or bonus token ``token_id`` after them.

    Unless ``finite``, it was computed from logits that are NaN or +inf, or all -inf, and has no meaning.
    ``logprobs`` are of all these tokens, if the sampling settings ask for them.
    """

    accepted: int
    token_id: int
    finite: bool = True
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row of logits is sampled, and for which ``position`` of its sequence."""

    sampling: Sampling
    position: int


def verify_rounds(logits: Tensor, rounds: Sequence[RoundToVerify]) -> list[VerificationResult]:
    """Verify the rounds of any number of sessions; the results reach the host in one transfer.

    Args:
        logits: [rows, V], float32: the rows of the first round, then those of the next; they may be changed.
        rounds: what to verify; each has ``num_logits`` rows.
    """
    if not rounds:
        return []
    unprocessed = _rows_for_logprobs(logits, rounds)
    _process_logits(logits, rounds)
    results = torch.empty((len(rounds), 3), dtype=torch.int64, device=logits.device)
    methods = [_method_of(one) for one in rounds]
    for method in dict.fromkeys(methods):
        is_method = np.array([one is method for one in methods])
        row_indices = np.flatnonzero(is_method.repeat([one.num_logits for one in rounds]))
        rows = logits if is_method.all() else logits[row_indices]
        results[is_method] = method(rows, [one for one, of_method in zip(rounds, is_method, strict=True) if of_method])
    verified = [VerificationResult(accepted, token_id, bool(finite)) for accepted, token_id, finite in results.tolist()]
    for index, rows in unprocessed.items():
        one, most = verified[index], rounds[index].sampling.logprobs or 0
        token_ids = [*rounds[index].drafted[: one.accepted], one.token_id]
        verified[index] = replace(one, logprobs=token_logprobs(rows, token_ids, most))
    return verified


def _method_of(one: RoundToVerify) -> Callable[[Tensor, Sequence[RoundToVerify]], Tensor]:
    if not one.rejection_sampling:
        return _verify_by_match
    return _verify_blocks if one.block_verification else _verify_by_rejection_sampling


def _rows_for_logprobs(logits: Tensor, rounds: Sequence[RoundToVerify]) -> dict[int, Tensor]:
    """Copies of the logits of the rounds whose log-probabilities are asked for, by index."""
    ends = np.cumsum([one.num_logits for one in rounds]).tolist()
    return {
        index: logits[end - one.num_logits : end].clone()
        for index, (one, end) in enumerate(zip(rounds, ends, strict=True))
        if one.sampling.logprobs is not None
    }


def _process_logits(logits: Tensor, rounds: Sequence[RoundToVerify]) -> None:
    """Change the logits of rounds whose sampling settings do so."""
    mask_time = MaskTime(sum(one.answer is not None and one.answer.grammar is not None for one in rounds))
    end = 0
    for one in rounds:
        start, end = end, end + one.num_logits
        if one.answer is not None:
            process_logits(logits[start:end], one.sampling, one.answer, one.drafted, mask_time)


def sample_target_tokens(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Sample the target's own tokens, of any number of sessions at once: int64 [n].

    The argmax at temperature 0; otherwise the argmax with the shared noise added
    (``protocol.coupling``), a function of target, settings and seed alone.

    Args:
        logits: [n, V].
        rows: how to sample each row.
    """
    token_ids = logits.new_empty(len(rows), dtype=torch.int64)
    groups: dict[Hashable, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_group_key(row.sampling), []).append(index)
    for indices in groups.values():
        part = logits if len(indices) == len(rows) else logits[indices]
        token_ids[indices] = _sample_group(part, [rows[index] for index in indices])
    return token_ids


def _group_key(sampling: Sampling) -> Hashable:
    """Rows with the same key are sampled together; without top-k and top-p their temperatures may differ."""
    if sampling.greedy or (sampling.top_k == 0 and sampling.top_p == 1):
        return sampling.greedy
    return sampling.temperature, sampling.top_k, sampling.top_p


def _sample_group(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    first = rows[0].sampling
    if first.greedy:
        return logits.argmax(dim=-1)
    temperatures = [row.sampling.temperature for row in rows]
    if first.top_k or first.top_p < 1:
        logits, temperatures = warp_scores(logits / first.temperature, first.top_k, first.top_p), [1.0] * len(rows)
    scales = torch.tensor(temperatures, dtype=torch.float64, device=logits.device)
    return coupled_choice(logits, scales, [row.sampling.seed for row in rows], [row.position for row in rows])


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
    temperatures = np.repeat(np.array([one.temperature for one in samplings], np.float32), counts)
    scores = logits - logits.amax(dim=-1, keepdim=True)
    scores /= torch.from_numpy(temperatures).to(logits.device)[:, None]
    limits = [(one.top_k, one.top_p) for one in samplings]
    for limit in set(limits) - {(0, 1.0)}:
        rows = np.flatnonzero(np.repeat([one == limit for one in limits], counts))
        scores[rows] = warp_scores(scores[rows], *limit)
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
    ordered, order = scores.softmax(dim=-1, dtype=torch.float64).sort(dim=-1, descending=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    return scores.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), -torch.inf)


def _verify_by_match(logits: Tensor, rounds: Sequence[RoundToVerify]) -> Tensor:
    """Accept what equals the target's own tokens: int64 [rounds, 3], the columns of ``VerificationResult``."""
    rows = _VerifyRows(rounds, logits.device)
    sampling_rows = [
        SamplingRow(one.sampling, one.position + index) for one in rounds for index in range(one.num_logits)
    ]
    target_ids = sample_target_tokens(logits, sampling_rows)
    ends = rows.first_rejected((target_ids == rows.drafted) | rows.given)
    return torch.stack([ends - rows.starts, target_ids[ends], rows.finite_up_to(ends, logits)], dim=1)


def _verify_by_rejection_sampling(logits: Tensor, rounds: Sequence[RoundToVerify]) -> Tensor:
    """Accept by P/Q and sample the recovered or bonus token: int64 [rounds, 3], as in ``VerificationResult``."""
    rows, sent = _VerifyRows(rounds, logits.device), _SentDistributions(rounds, logits.shape[1])
    accept_uniforms, result_uniforms = rows.uniforms(Stream.ACCEPT), rows.uniforms(Stream.RESULT)
    draft_probs = torch.from_numpy(sent.drafted_probs).to(logits.device)
    weights, totals = target_weights(logits, [one.sampling for one in rounds], [one.num_logits for one in rounds])
    target_probs = weights.gather(1, rows.drafted.clamp(min=0)[:, None]).double().div_(totals)[:, 0]
    ends = rows.first_rejected((accept_uniforms * draft_probs < target_probs) & (rows.drafted != _NO_TOKEN))
    residual = weights[ends].double().div_(totals[ends])
    sent.subtract_from(residual, ends)
    token_ids = _sample(residual, result_uniforms[ends])
    return torch.stack([ends - rows.starts, token_ids, rows.finite_up_to(ends, logits)], dim=1)


def _verify_blocks(logits: Tensor, rounds: Sequence[RoundToVerify]) -> Tensor:
    """Accept by the joint probability of the drafted tokens: int64 [rounds, 3], as in ``VerificationResult``."""
    rows, sent = _VerifyRows(rounds, logits.device), _SentDistributions(rounds, logits.shape[1])
    starts = rows.starts.cpu().numpy()
    weights, totals = target_weights(logits, [one.sampling for one in rounds], [one.num_logits for one in rounds])
    largest = logits.amax(dim=-1, keepdim=True)
    drafted_weights = weights.gather(1, rows.drafted.clamp(min=0)[:, None])
    drafted, sums, finite = torch.cat([drafted_weights, totals, largest.isfinite()], dim=1).cpu().numpy().T
    joint = joint_probabilities(drafted / sums, sent.drafted_probs, starts)
    scales = joint / sums
    numbers = rows.random_numbers(Stream.ACCEPT, in_block=True)
    ends = last_accepted(joint, joint - sent.overlap(weights, scales), numbers, starts)
    residual = weights[ends].double().mul_(rows.to_device(scales[ends])[:, None])
    sent.subtract_from(residual, rows.to_device(ends))
    token_ids = _sample(residual, rows.to_device(rows.random_numbers(Stream.RESULT)[ends]))
    is_finite = np.logical_and.reduceat((finite > 0) | (joint == 0), starts)  # nothing follows an impossible token
    return torch.stack([rows.to_device(ends - starts), token_ids, rows.to_device(is_finite)], dim=1)


def _sample(weights: Tensor, numbers: Tensor) -> Tensor:
    """Inverse-transform sampling: a token for each row of unnormalised ``weights`` [n, V], numbers in [0, 1)."""
    cumulative = weights.cumsum(dim=-1)
    thresholds = cumulative[:, -1:] * numbers[:, None]
    return torch.searchsorted(cumulative, thresholds, right=True)[:, 0].clamp_(max=weights.shape[1] - 1)


class _VerifyRows:
    """The rows of logits of some rounds, on the model's device.

    Attributes:
        starts: the first row of each round, int64 [rounds].
        drafted: the drafted token of each row, int64 [n]; ``_NO_TOKEN`` in the last row of a round.
        given: whether it is accepted whatever the target's is, bool [n].
    """

    def __init__(self, rounds: Sequence[RoundToVerify], torch_device: torch.device) -> None:
        counts = np.array([one.num_logits for one in rounds])
        drafted = np.fromiter(chain.from_iterable((*one.drafted, _NO_TOKEN) for one in rounds), np.int64)
        starts = counts.cumsum() - counts
        self._torch_device = torch_device
        self._seeds = np.repeat(np.array([one.sampling.seed for one in rounds], np.uint64), counts)
        self._first_drafted = np.repeat([one.position for one in rounds], counts)
        self._positions = np.arange(len(drafted)) - np.repeat(starts, counts) + self._first_drafted
        self._round_indices = self.to_device(np.repeat(np.arange(len(rounds)), counts))
        self.starts = self.to_device(starts)
        self.drafted = self.to_device(drafted)
        self.given = self.to_device(np.repeat([one.given for one in rounds], counts) & (drafted != _NO_TOKEN))

    def random_numbers(self, stream: Stream, in_block: bool = False) -> npt.NDArray[np.float64]:
        """Of all rows, float64 [n] in [0, 1), on the host; ``in_block`` those of the position within its Draft."""
        return uniforms(self._seeds, self._positions, stream, self._first_drafted if in_block else None)

    def uniforms(self, stream: Stream) -> Tensor:
        """Random numbers of all rows, float64 [n] in [0, 1)."""
        return self.to_device(self.random_numbers(stream))

    def first_rejected(self, accepted: Tensor) -> Tensor:
        """The first row of each round that is not ``accepted`` [n]: int64 [rounds]."""
        rejected = torch.where(accepted, len(accepted), torch.arange(len(accepted), device=accepted.device))
        return torch.full_like(self.starts, len(accepted)).scatter_reduce_(0, self._round_indices, rejected, "amin")

    def finite_up_to(self, ends: Tensor, logits: Tensor) -> Tensor:
        """Whether the logits [n, V] are finite up to the row ``ends`` of each round: bool [rounds].

        Later rows follow a rejected token, so that the result does not depend on them. Single
        logits of -inf are tokens that the target excludes.
        """
        return self.first_rejected(logits.amax(dim=-1).isfinite()) > ends  # the largest logit is NaN if any is

    def to_device(self, numbers: npt.NDArray[Any]) -> Tensor:
        """A host array on the model's device."""
        return torch.from_numpy(numbers).to(self._torch_device)


class _SentDistributions:
    """What was sent for each row: the entries of sparse distributions, concatenated, and full ones in FP16.

    Attributes:
        drafted_probs: Q of the drafted token of each row, float64 [n]; 0 in the last row of a round.
    """

    def __init__(self, rounds: Sequence[RoundToVerify], vocab_size: int) -> None:
        distributions = list(chain.from_iterable(one.distributions for one in rounds))
        drafted = np.fromiter(chain.from_iterable(one.drafted for one in rounds), np.int64)
        counts = np.array([one.num_logits for one in rounds])
        round_indices = np.repeat(np.arange(len(rounds)), counts - 1)
        rows = np.arange(len(round_indices)) + round_indices  # each earlier round has one row more than drafted tokens
        sparse = [one for one in distributions if isinstance(one, SparseDistribution)]
        full = [one for one in distributions if isinstance(one, FullDistribution)]
        is_full = np.array([isinstance(one, FullDistribution) for one in distributions], bool)
        lengths = [len(one) for one in sparse]
        self._rows, self._round_indices = (np.repeat(one[~is_full], lengths) for one in (rows, round_indices))
        self._support = _concatenate([one.support for one in sparse], np.int64)
        self._probs = _concatenate([one.probs for one in sparse], np.float64)
        self._full_rows, self._fp16 = rows[is_full], [one.fp16 for one in full]
        self.drafted_probs = np.zeros(counts.sum())
        self.drafted_probs[rows[~is_full]] = self._probs_of((rows * vocab_size + drafted)[~is_full], vocab_size)
        self.drafted_probs[rows[is_full]] = [
            one.probability(token_id) for one, token_id in zip(full, drafted[is_full].tolist(), strict=True)
        ]

    def overlap(self, weights: Tensor, scales: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Σ_x min(scale · weight(x), Q(x)) of each row of weights [n, V], float64 [n] on the host; 0 without a Q."""
        rows, support = (torch.from_numpy(one).to(weights.device) for one in (self._rows, self._support))
        common = np.minimum(weights[rows, support].cpu().numpy() * scales[self._rows], self._probs)
        overlaps = np.zeros(len(scales))
        np.add.at(overlaps, self._rows, common)
        for row, fp16 in zip(self._full_rows.tolist(), self._fp16, strict=True):
            draft_probs = torch.from_numpy(fp16.astype(np.float32)).to(weights.device)
            draft_probs /= draft_probs.sum(dtype=torch.float64)
            common_probs = torch.minimum(weights[row] * float(scales[row]), draft_probs)
            overlaps[row] = common_probs.sum(dtype=torch.float64).item()
        return overlaps

    def subtract_from(self, target_probs: Tensor, ends: Tensor) -> None:
        """Turn target_probs [rounds, V], P of the rows ``ends``, into max(0, P − Q), in place."""
        self._subtract_sparse(target_probs, ends)
        if self._fp16:
            self._subtract_full(target_probs, ends)
        target_probs.clamp_(min=0)

    def _subtract_sparse(self, target_probs: Tensor, ends: Tensor) -> None:
        rows, round_indices, support = (
            torch.from_numpy(one).to(ends.device) for one in (self._rows, self._round_indices, self._support)
        )
        probs = torch.from_numpy(self._probs).to(ends.device)
        draft_probs = torch.where(ends[round_indices] == rows, probs, 0.0)
        flat_indices = round_indices * target_probs.shape[1] + support
        target_probs.view(-1).index_add_(0, flat_indices, draft_probs, alpha=-1)

    def _subtract_full(self, target_probs: Tensor, ends: Tensor) -> None:
        """Only the rows ``ends`` are converted to float64: all rows would need four times the memory of the Drafts."""
        rows = torch.from_numpy(self._full_rows).to(ends.device)
        fp16 = torch.from_numpy(np.stack(self._fp16)).to(ends.device)
        indices = torch.searchsorted(rows, ends).clamp_(max=len(rows) - 1)
        draft_probs = fp16[indices].double()
        draft_probs /= draft_probs.sum(dim=-1, keepdim=True)
        target_probs -= draft_probs * (rows[indices] == ends)[:, None]

    def _probs_of(self, keys: npt.NDArray[np.int64], vocab_size: int) -> npt.NDArray[np.float64]:
        """The probabilities of (row, token) pairs, given as row · V + token; 0 outside the support."""
        known = self._rows * vocab_size + self._support
        indices = known.searchsorted(keys).clip(max=max(0, len(known) - 1))
        return np.where(known[indices] == keys, self._probs[indices], 0.0) if len(known) else np.zeros(len(keys))


def _concatenate(arrays: Sequence[npt.NDArray[Any]], dtype: type[Any]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)
