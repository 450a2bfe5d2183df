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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from basestation.target.host_transfer import HostTransfer
from basestation.verification.block_verification import joint_probabilities, last_accepted
from basestation.verification.logits_processing import AnswerSoFar, MaskTime, process_logits
from basestation.verification.logprobs import token_logprobs
from basestation.verification.sent_distributions import SentDistributions
from basestation.verification.target_sampling import SamplingRow, TargetSampling, TargetWeights
from protocol.logprobs import TokenLogprobs
from protocol.messages import DraftDistribution, Sampling
from protocol.randomness import Stream, uniforms

_NO_TOKEN = -1


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


def verify_rounds(logits: Tensor, rounds: Sequence[RoundToVerify]) -> list[VerificationResult]:
    """Verify the rounds of any number of sessions.

    What was drafted reaches the device in one copy, the results the host in another. Sampling settings
    that change logits, and log-probabilities, take further ones.

    Args:
        logits: [rows, V], float32: the rows of the first round, then those of the next; they may be changed.
        rounds: what to verify; each has ``num_logits`` rows.
    """
    if not rounds:
        return []
    unprocessed = _rows_for_logprobs(logits, rounds)
    _process_logits(logits, rounds)
    results = torch.cat([one.verify(logits) for one in _verifications(rounds, logits)]).tolist()
    verified = [VerificationResult(0, 0)] * len(rounds)
    for index, accepted, token_id, finite in results:
        verified[index] = VerificationResult(accepted, token_id, bool(finite))
    for index, rows in unprocessed.items():
        one, most = verified[index], rounds[index].sampling.logprobs or 0
        token_ids = [*rounds[index].drafted[: one.accepted], one.token_id]
        verified[index] = replace(one, logprobs=token_logprobs(rows, token_ids, most))
    return verified


class _Verification(Protocol):
    """Rounds that are verified in the same way, with all that this takes from the host."""

    def __init__(self, rounds: Sequence[RoundToVerify], part: "_Part", transfer: HostTransfer) -> None: ...

    def verify(self, logits: Tensor) -> Tensor:
        """The index of each round and its ``VerificationResult``: int64 [rounds, 4].

        Args:
            logits: [rows, V], of all rounds of the pass.
        """


def _verifications(rounds: Sequence[RoundToVerify], logits: Tensor) -> list[_Verification]:
    transfer, counts = HostTransfer(logits.device), np.array([one.num_logits for one in rounds])
    methods = [_method_of(one) for one in rounds]
    verifications = []
    for method in dict.fromkeys(methods):
        is_method = np.array([one is method for one in methods])
        part = _Part(is_method, counts, logits.shape[1], transfer)
        chosen = [one for one, of_method in zip(rounds, is_method, strict=True) if of_method]
        verifications.append(method(chosen, part, transfer))
    return verifications


def _method_of(one: RoundToVerify) -> type[_Verification]:
    if not one.rejection_sampling:
        return _Matching
    return _BlockVerification if one.block_verification else _RejectionSampling


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


class _Matching:
    """Accepts what equals the target's own tokens."""

    def __init__(self, rounds: Sequence[RoundToVerify], part: "_Part", transfer: HostTransfer) -> None:
        self._part, self._rows = part, _VerifyRows(rounds, transfer)
        self._sampling = TargetSampling(
            [SamplingRow(one.sampling, one.position + index) for one in rounds for index in range(one.num_logits)],
            transfer,
        )

    def verify(self, logits: Tensor) -> Tensor:
        """See ``_Verification.verify``."""
        logits, rows = self._part.of(logits), self._rows
        target_ids = self._sampling.sample(logits)
        ends = rows.first_rejected((target_ids == rows.drafted.tensor) | rows.given.tensor)
        return self._part.results(ends - rows.starts.tensor, target_ids[ends], rows.finite_up_to(ends, logits))


class _RejectionSampling:
    """Accepts by P/Q and samples the recovered or bonus token."""

    def __init__(self, rounds: Sequence[RoundToVerify], part: "_Part", transfer: HostTransfer) -> None:
        self._part, self._rows = part, _VerifyRows(rounds, transfer)
        self._sent = SentDistributions(
            [one.drafted for one in rounds], [one.distributions for one in rounds], part.vocab_size, transfer
        )
        counts = [one.num_logits for one in rounds]
        self._weights = TargetWeights([one.sampling for one in rounds], counts, transfer)
        self._accept_uniforms = transfer.add(self._rows.random_numbers(Stream.ACCEPT))
        self._result_uniforms = transfer.add(self._rows.random_numbers(Stream.RESULT))

    def verify(self, logits: Tensor) -> Tensor:
        """See ``_Verification.verify``."""
        logits, rows, sent = self._part.of(logits), self._rows, self._sent
        drafted = rows.drafted.tensor
        weights, totals = self._weights.of(logits)
        target_probs = weights.gather(1, drafted.clamp(min=0)[:, None]).double().div_(totals)[:, 0]
        accepted = self._accept_uniforms.tensor * sent.drafted_probs.tensor < target_probs
        ends = rows.first_rejected(accepted & (drafted != _NO_TOKEN))
        residual = weights[ends].double().div_(totals[ends])
        sent.subtract_from(residual, ends)
        token_ids = _sample(residual, self._result_uniforms.tensor[ends])
        return self._part.results(ends - rows.starts.tensor, token_ids, rows.finite_up_to(ends, logits))


class _BlockVerification:
    """Accepts by the joint probability of the drafted tokens."""

    def __init__(self, rounds: Sequence[RoundToVerify], part: "_Part", transfer: HostTransfer) -> None:
        self._part, self._rows = part, _VerifyRows(rounds, transfer)
        self._sent = SentDistributions(
            [one.drafted for one in rounds], [one.distributions for one in rounds], part.vocab_size, transfer
        )
        counts = [one.num_logits for one in rounds]
        self._longest = max(counts)
        self._weights = TargetWeights([one.sampling for one in rounds], counts, transfer)
        self._accept_uniforms = transfer.add(self._rows.random_numbers(Stream.ACCEPT, in_block=True))
        self._result_uniforms = transfer.add(self._rows.random_numbers(Stream.RESULT))

    def verify(self, logits: Tensor) -> Tensor:
        """See ``_Verification.verify``."""
        logits, rows, sent = self._part.of(logits), self._rows, self._sent
        starts, round_indices = rows.starts.tensor, rows.round_indices.tensor
        weights, totals = self._weights.of(logits)
        sums = totals[:, 0]
        drafted = weights.gather(1, rows.drafted.tensor.clamp(min=0)[:, None])[:, 0]
        joint = joint_probabilities(drafted / sums, sent.drafted_probs.tensor, starts, round_indices, self._longest)
        scales = joint / sums
        residual_mass = joint - sent.overlap(weights, scales)
        ends = last_accepted(joint, residual_mass, self._accept_uniforms.tensor, starts, round_indices)
        residual = weights[ends].double().mul_(scales[ends][:, None])
        sent.subtract_from(residual, ends)
        token_ids = _sample(residual, self._result_uniforms.tensor[ends])
        finite = logits.amax(dim=-1).isfinite() | (joint == 0)  # nothing follows an impossible token
        return self._part.results(ends - starts, token_ids, rows.first_rejected(finite) == len(logits))


def _sample(weights: Tensor, numbers: Tensor) -> Tensor:
    """Inverse-transform sampling: a token for each row of unnormalised ``weights`` [n, V], numbers in [0, 1)."""
    cumulative = weights.cumsum(dim=-1)
    thresholds = cumulative[:, -1:] * numbers[:, None]
    return torch.searchsorted(cumulative, thresholds, right=True)[:, 0].clamp_(max=weights.shape[1] - 1)


class _Part:
    """Some of a pass's rounds.

    Args:
        is_part: for each round of the pass, whether it is one of them.
        counts: rows of each round of the pass.
        vocab_size: V.
        transfer: of the pass.

    Attributes:
        vocab_size: see above.
    """

    def __init__(
        self, is_part: npt.NDArray[np.bool_], counts: npt.NDArray[np.int64], vocab_size: int, transfer: HostTransfer
    ) -> None:
        self.vocab_size = vocab_size
        self._indices = transfer.add(np.flatnonzero(is_part))
        self._rows = None if is_part.all() else transfer.add(np.flatnonzero(is_part.repeat(counts)))

    def of(self, logits: Tensor) -> Tensor:
        """Its rows of the logits [rows, V] of the pass."""
        return logits if self._rows is None else logits[self._rows.tensor]

    def results(self, accepted: Tensor, token_ids: Tensor, finite: Tensor) -> Tensor:
        """See ``_Verification.verify``; each [rounds]."""
        return torch.stack([self._indices.tensor, accepted, token_ids, finite], dim=1)


class _VerifyRows:
    """The rows of logits of some rounds.

    Attributes:
        starts: the first row of each round, int64 [rounds].
        round_indices: the round of each row, int64 [n].
        drafted: the drafted token of each row, int64 [n]; ``_NO_TOKEN`` in the last row of a round.
        given: whether it is accepted whatever the target's is, bool [n].
    """

    def __init__(self, rounds: Sequence[RoundToVerify], transfer: HostTransfer) -> None:
        counts = np.array([one.num_logits for one in rounds])
        drafted = np.fromiter(chain.from_iterable((*one.drafted, _NO_TOKEN) for one in rounds), np.int64)
        starts = counts.cumsum() - counts
        self._seeds = np.repeat(np.array([one.sampling.seed for one in rounds], np.uint64), counts)
        self._first_drafted = np.repeat([one.position for one in rounds], counts)
        self._positions = np.arange(len(drafted)) - np.repeat(starts, counts) + self._first_drafted
        self.starts = transfer.add(starts)
        self.round_indices = transfer.add(np.repeat(np.arange(len(rounds)), counts))
        self.drafted = transfer.add(drafted)
        self.given = transfer.add(np.repeat([one.given for one in rounds], counts) & (drafted != _NO_TOKEN))

    def random_numbers(self, stream: Stream, in_block: bool = False) -> npt.NDArray[np.float64]:
        """Of all rows, float64 [n] in [0, 1), on the host; ``in_block`` those of the position within its Draft."""
        return uniforms(self._seeds, self._positions, stream, self._first_drafted if in_block else None)

    def first_rejected(self, accepted: Tensor) -> Tensor:
        """The first row of each round that is not ``accepted`` [n], n where there is none: int64 [rounds]."""
        rejected = torch.where(accepted, len(accepted), torch.arange(len(accepted), device=accepted.device))
        none = torch.full_like(self.starts.tensor, len(accepted))
        return none.scatter_reduce_(0, self.round_indices.tensor, rejected, "amin")

    def finite_up_to(self, ends: Tensor, logits: Tensor) -> Tensor:
        """Whether the logits [n, V] are finite up to the row ``ends`` of each round: bool [rounds].

        Later rows follow a rejected token, so that the result does not depend on them. Single
        logits of -inf are tokens that the target excludes.
        """
        return self.first_rejected(logits.amax(dim=-1).isfinite()) > ends  # the largest logit is NaN if any is
