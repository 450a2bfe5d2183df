"""Judging a draft: what stands, and what follows it.

For drafted tokens x_i ~ Q_i and the target's distributions P_i (arXiv:2509.04576,
after Leviathan et al. 2023):

- x_i is accepted if u_i · Q_i(x_i) < P_i(x_i), u_i uniform in [0, 1);
- at the first rejection the *recovered* token is drawn from norm(max(0, P_i − Q_i));
- when all are accepted, the *bonus* token is drawn from P_{γ+1}.

Whatever Q is, the tokens are then distributed as the target's own, on the
condition that Q is exactly what the device drew from (invariants 1 and 3).

All rounds of a pass are judged at once, as tensors on the model's device: row by
row it is asked whether the drafted token stands, and the first row of each round
that does not is where the round ends. The row behind the last drafted token never
stands.

Knows tensors and the seed; not where the logits came from.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from basestation.coupled_sampling import coupled_choice
from protocol.messages import Sampling
from protocol.randomness import Stream, uniforms
from protocol.sparse import SparseDistribution

_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Round:
    """A round to be judged: it takes a row of logits for each drafted token, and one more.

    Attributes:
        sampling: how the target is sampled.
        position: of the first drafted token in the whole sequence.
        drafted: the draft_len tokens.
        distributions: what each was drawn from, where that decides.
        by_distributions: whether drafts are accepted by P/Q; else by equality with the target's own tokens.
    """

    sampling: Sampling
    position: int
    drafted: Sequence[int] = ()
    distributions: Sequence[SparseDistribution] = ()
    by_distributions: bool = False

    @property
    def rows(self) -> int:
        """How many rows of logits it takes."""
        return len(self.drafted) + 1


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """The first ``accepted`` drafted tokens stand, ``token_id`` follows them."""

    accepted: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Draw:
    """What a row of logits is for: the token at ``position`` of a sequence."""

    sampling: Sampling
    position: int


def verify_rounds(logits: Tensor, rounds: Sequence[Round]) -> list[VerificationResult]:
    """Judge the rounds of any number of sessions; the results come to the host in one transfer.

    Args:
        logits: [rows, V], float32, the rows of one round after those of another.
        rounds: what the rows are for.
    """
    judged = torch.empty((len(rounds), 2), dtype=torch.int64, device=logits.device)
    kinds = np.array([one.by_distributions for one in rounds], bool)
    row_kinds = kinds.repeat([one.rows for one in rounds])
    for kind, judge in ((False, _verify_by_match), (True, _verify_by_probability)):
        places = np.flatnonzero(kinds == kind).tolist()
        if places:
            rows = logits if len(places) == len(rounds) else logits[np.flatnonzero(row_kinds == kind)]
            judged[places] = judge(rows, [rounds[place] for place in places])
    return [VerificationResult(accepted, token_id) for accepted, token_id in judged.tolist()]


def choose_tokens(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The target's own tokens, of any number of sessions at once: int64 [n].

    At temperature 0 the argmax; above, the choice that the shared noise margins to
    (``protocol.coupling``), a function of target, settings and seed alone.

    Args:
        logits: [n, V], a row for each draw.
        draws: what the rows are for.
    """
    chosen = logits.new_empty(len(draws), dtype=torch.int64)
    groups: dict[Hashable, list[int]] = {}
    for row, draw in enumerate(draws):
        groups.setdefault(_alike(draw.sampling), []).append(row)
    for rows in groups.values():
        part = logits if len(rows) == len(draws) else logits[rows]
        chosen[rows] = _choose_alike(part, [draws[row] for row in rows])
    return chosen


def _alike(sampling: Sampling) -> Hashable:
    """What rows must share to be chosen together: everything but the seed, and the temperature if that is all."""
    if sampling.greedy or (sampling.top_k == 0 and sampling.top_p == 1):
        return sampling.greedy
    return sampling.temperature, sampling.top_k, sampling.top_p


def _choose_alike(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    first = draws[0].sampling
    if first.greedy:
        return logits.argmax(dim=-1)
    temperatures = [draw.sampling.temperature for draw in draws]
    if first.top_k or first.top_p < 1:
        logits, temperatures = warp_scores(logits / first.temperature, first.top_k, first.top_p), [1.0] * len(draws)
    scales = torch.tensor(temperatures, dtype=torch.float64, device=logits.device)
    return coupled_choice(logits, scales, [draw.sampling.seed for draw in draws], [draw.position for draw in draws])


def target_weights(logits: Tensor, samplings: Sequence[Sampling], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the target is sampled from: a token's probability is its weight over its row's total.

    The likeliest token's weight is 1.

    Args:
        logits: [n, V], float32.
        samplings: how, at temperatures above 0.
        counts: for how many rows each.

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
    """Scores after top-k and top-p: like ``scores`` [n, V], -inf for what may not be drawn.

    Top-k first (ties with the k-th are kept), then top-p (the smallest set of
    likeliest tokens whose mass reaches p). Scores are logits over the temperature.
    """
    if 0 < top_k < scores.shape[-1]:
        smallest = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = scores.softmax(dim=-1, dtype=torch.float64).sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p
        scores = scores.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), -torch.inf)
    return scores


def _verify_by_match(logits: Tensor, rounds: Sequence[Round]) -> Tensor:
    """Accept what equals the target's own tokens: int64 [rounds, 2], accepted and what follows."""
    rows = _Rows(rounds, logits.device)
    draws = [Draw(one.sampling, one.position + index) for one in rounds for index in range(one.rows)]
    target_ids = choose_tokens(logits, draws)
    ends = rows.first_rejected(target_ids == rows.drafted)
    return torch.stack([ends - rows.starts, target_ids[ends]], dim=1)


def _verify_by_probability(logits: Tensor, rounds: Sequence[Round]) -> Tensor:
    """Accept by P/Q, and draw the recovered or bonus token: int64 [rounds, 2]."""
    rows, entries = _Rows(rounds, logits.device), _Entries(rounds, logits.shape[1])
    accepting, resulting = rows.numbers(Stream.ACCEPT), rows.numbers(Stream.RESULT)
    draft_probs = torch.from_numpy(entries.drafted_probs).to(logits.device)
    weights, totals = target_weights(logits, [one.sampling for one in rounds], [one.rows for one in rounds])
    target_probs = weights.gather(1, rows.drafted.clamp(min=0)[:, None]).double().div_(totals)[:, 0]
    ends = rows.first_rejected((accepting * draft_probs < target_probs) & (rows.drafted != _NO_TOKEN))
    residual = weights[ends].double().div_(totals[ends])
    entries.subtract(residual, ends)
    return torch.stack([ends - rows.starts, _draw(residual, resulting[ends])], dim=1)


def _draw(weights: Tensor, numbers: Tensor) -> Tensor:
    """For each row of ``weights`` [n, V] the token that a number in [0, 1) falls on, tokens being as long as these."""
    cumulative = weights.cumsum(dim=-1)
    thresholds = cumulative[:, -1:] * numbers[:, None]
    return torch.searchsorted(cumulative, thresholds, right=True)[:, 0].clamp_(max=weights.shape[1] - 1)


class _Rows:
    """The rows of some rounds, on the model's device.

    Attributes:
        starts: the first row of each round, int64 [rounds].
        drafted: the drafted token of each row, int64 [n]; none behind the last of a round.
    """

    def __init__(self, rounds: Sequence[Round], torch_device: torch.device) -> None:
        counts = np.array([one.rows for one in rounds])
        drafted = np.fromiter(chain.from_iterable((*one.drafted, _NO_TOKEN) for one in rounds), np.int64)
        starts = counts.cumsum() - counts
        self._torch_device = torch_device
        self._seeds = np.repeat(np.array([one.sampling.seed for one in rounds], np.uint64), counts)
        self._positions = np.arange(len(drafted)) + np.repeat([one.position for one in rounds] - starts, counts)
        self._owners = self._place(np.repeat(np.arange(len(rounds)), counts))
        self.starts = self._place(starts)
        self.drafted = self._place(drafted)

    def numbers(self, stream: Stream) -> Tensor:
        """The random numbers of all rows, float64 [n] in [0, 1)."""
        return self._place(uniforms(self._seeds, self._positions, stream))

    def first_rejected(self, stands: Tensor) -> Tensor:
        """For each round its first row that does not stand."""
        fallen = torch.where(stands, len(stands), torch.arange(len(stands), device=stands.device))
        return torch.full_like(self.starts, len(stands)).scatter_reduce_(0, self._owners, fallen, "amin")

    def _place(self, numbers: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(numbers).to(self._torch_device)


class _Entries:
    """The entries of all distributions, one run of numbers, each with the row it belongs to."""

    def __init__(self, rounds: Sequence[Round], vocab_size: int) -> None:
        distributions = list(chain.from_iterable(one.distributions for one in rounds))
        drafted = np.fromiter(chain.from_iterable(one.drafted for one in rounds), np.int64)
        counts = np.array([one.rows for one in rounds])
        owners = np.repeat(np.arange(len(rounds)), counts - 1)
        rows = np.arange(len(owners)) + owners  # each round before has a row more than tokens
        lengths = [len(one) for one in distributions]
        self._rows, self._owners = np.repeat(rows, lengths), np.repeat(owners, lengths)
        self._support = _joined([one.support for one in distributions], np.int64)
        self._probs = _joined([one.probs for one in distributions], np.float64)
        self.drafted_probs = np.zeros(counts.sum())  # of the drafted tokens, 0 for the row behind them
        self.drafted_probs[rows] = self._probs_of(rows * vocab_size + drafted, vocab_size)

    def subtract(self, target_probs: Tensor, ends: Tensor) -> None:
        """Make target_probs [rounds, V], of the rows ``ends``, into max(0, P − Q), not normalised."""
        rows, owners, support = (
            torch.from_numpy(one).to(ends.device) for one in (self._rows, self._owners, self._support)
        )
        probs = torch.from_numpy(self._probs).to(ends.device)
        taken = torch.where(ends[owners] == rows, probs, 0.0)
        target_probs.view(-1).index_add_(0, owners * target_probs.shape[1] + support, taken, alpha=-1)
        target_probs.clamp_(min=0)

    def _probs_of(self, keys: npt.NDArray[np.int64], vocab_size: int) -> npt.NDArray[np.float64]:
        """The probabilities of tokens; a key is row · V + token."""
        known = self._rows * vocab_size + self._support
        places = known.searchsorted(keys).clip(max=max(0, len(known) - 1))
        return np.where(known[places] == keys, self._probs[places], 0.0) if len(known) else np.zeros(len(keys))


def _joined(arrays: Sequence[npt.NDArray[Any]], dtype: type[Any]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)
