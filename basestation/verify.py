"""Judging a draft: what stands, and what follows it.

For drafted tokens x_i ~ Q_i and the target's distributions P_i (arXiv:2509.04576,
after Leviathan et al. 2023):

- x_i is accepted if u_i · Q_i(x_i) < P_i(x_i), u_i uniform in [0, 1);
- at the first rejection the *recovered* token is drawn from norm(max(0, P_i − Q_i));
- when all are accepted, the *bonus* token is drawn from P_{γ+1}.

Whatever Q is, the tokens are then distributed as the target's own, on the
condition that Q is exactly what the device drew from (invariants 1 and 3).

Knows tensors and the seed; not where the logits came from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from basestation.coupling import coupled_choice
from protocol.messages import Sampling
from protocol.randomness import Stream, uniform
from protocol.sparse import SparseDistribution

PLAIN = Sampling(1.0)


@dataclass(frozen=True)
class Judgement:
    """The first ``accepted`` drafted tokens stand, ``token_id`` follows them."""

    accepted: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Draw:
    """What a row of logits is for: the token at ``position`` of a sequence."""

    sampling: Sampling
    position: int


def choose_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """The target's own tokens, of any number of sessions at once.

    At temperature 0 the argmax; above, the choice that the shared noise leads to
    (``protocol.coupling``), a function of target, settings and seed alone.

    Args:
        logits: [n, V], a row for each draw.
        draws: what the rows are for.
    """
    chosen = logits.new_empty(len(draws), dtype=torch.int64)
    groups: dict[Sampling, list[int]] = {}
    for row, draw in enumerate(draws):
        groups.setdefault(_shape_of(draw.sampling), []).append(row)
    for shape, rows in groups.items():
        part = logits if len(rows) == len(draws) else logits[rows]
        if shape.greedy:
            chosen[rows] = part.argmax(dim=-1)
            continue
        samplings = [draws[row].sampling for row in rows]
        temperatures = torch.tensor([one.temperature for one in samplings], dtype=torch.float64, device=part.device)
        if shape != PLAIN:
            part = warp_scores(part, shape)
            temperatures = torch.ones_like(temperatures)
        keys = [(one.seed, draws[row].position) for one, row in zip(samplings, rows, strict=True)]
        chosen[rows] = coupled_choice(part, temperatures, keys)
    return chosen.tolist()


def _shape_of(sampling: Sampling) -> Sampling:
    """What rows must share to be chosen together: everything but the seed, and the temperature if that is all."""
    if not sampling.greedy and sampling.top_k == 0 and sampling.top_p == 1:
        return PLAIN
    return replace(sampling, seed=0)


def match(target_ids: Sequence[int], drafted: Sequence[int]) -> Judgement:
    """Accept what equals the target's own tokens: one for each drafted token, and one more."""
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == target_ids[accepted]:
        accepted += 1
    return Judgement(accepted, target_ids[accepted])


def judge_sampled(
    target_probs: Tensor,
    drafted: Sequence[int],
    distributions: Sequence[SparseDistribution],
    seed: int,
    position: int,
) -> Judgement:
    """Accept by P/Q, and draw the recovered or bonus token.

    Args:
        target_probs: [draft_len + 1, V], the target's as ``warp`` gives them, row i for the i-th drafted token.
        drafted: the draft_len tokens.
        distributions: what each was drawn from.
        seed: of the session.
        position: of the first drafted token in the whole sequence.
    """
    for index, (token_id, draft_probs) in enumerate(zip(drafted, distributions, strict=True)):
        threshold = uniform(seed, position + index, Stream.ACCEPT) * draft_probs.probability(token_id)
        if threshold < float(target_probs[index, token_id]):
            continue
        residual = residual_of(target_probs[index], draft_probs)
        return Judgement(index, draw(residual, uniform(seed, position + index, Stream.RESULT)))
    end = len(drafted)
    return Judgement(end, draw(target_probs[end], uniform(seed, position + end, Stream.RESULT)))


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distributions the target is sampled from: float64 probabilities [n, V]."""
    if sampling.greedy:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).double()
    return warp_scores(logits.double(), sampling).softmax(dim=-1)


def warp_scores(logits: Tensor, sampling: Sampling) -> Tensor:
    """Unnormalised log probabilities of what the target is sampled from: like ``logits`` [n, V], -inf for what is not.

    Temperature above 0, then top-k (ties with the k-th are kept), then top-p (the
    smallest set of likeliest tokens whose mass reaches p).
    """
    scores = logits / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        smallest = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.softmax(dim=-1).sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), -torch.inf)
    return scores


def residual_of(target_probs: Tensor, draft_probs: SparseDistribution) -> Tensor:
    """max(0, P − Q), float64 [V], not normalised."""
    support = torch.from_numpy(draft_probs.support).to(target_probs.device)
    residual = target_probs.clone()
    residual[support] -= torch.from_numpy(draft_probs.probs).to(target_probs.device)
    return residual.clamp_(min=0)


def draw(weights: Tensor, uniform_number: float) -> int:
    """The token that a uniform number in [0, 1) falls on, tokens being as long as their weights [V]."""
    cumulative = weights.cumsum(dim=0)
    threshold = cumulative[-1] * uniform_number
    return int(torch.searchsorted(cumulative, threshold, right=True).clamp(max=len(weights) - 1))
