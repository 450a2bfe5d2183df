"""The slow and obvious twin of ``basestation.verification.verify``: one round at a time, in NumPy and float64."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from basestation.verification.verify import RoundToVerify, VerificationResult
from protocol.coupling import PositionNoise
from protocol.messages import DraftDistribution, Sampling
from protocol.randomness import UNIFORM_BITS, Stream, random_bits

Probs = npt.NDArray[np.float64]  # [V]


def target_probs(logits: npt.NDArray[np.floating], sampling: Sampling) -> Probs:
    """P after temperature, top-k (with ties), then top-p."""
    scores = logits.astype(np.float64) / sampling.temperature
    probs: Probs = np.exp(scores - scores.max())
    if sampling.top_k:
        probs[probs < np.sort(probs)[-min(sampling.top_k, len(probs))]] = 0
    probs /= probs.sum()
    if sampling.top_p < 1:
        order = np.argsort(-probs, kind="stable")
        kept = int((np.cumsum(probs[order]) - probs[order] < sampling.top_p - 1e-7).sum())
        probs[order[kept:]] = 0
    probs /= probs.sum()
    return probs


def dense(distribution: DraftDistribution) -> Probs:
    """Q as a dense vector."""
    probs = np.zeros(distribution.vocab_size)
    probs[distribution.support] = distribution.probs
    return probs


def uniform(seed: int, position: int, stream: Stream, first_drafted: int | None = None) -> float:
    """A uniform random number in [0, 1)."""
    return random_bits(seed, position, stream, first_drafted) / 2.0**UNIFORM_BITS


def sample_one(weights: Probs, number: float) -> int:
    """Inverse-transform sampling with ``number`` in [0, 1)."""
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, cumulative[-1] * number, side="right"))


def accepts(number: float, target_prob: float, draft_prob: float) -> bool:
    """True with probability min(1, P/Q)."""
    return number * draft_prob < target_prob


def verify_one(
    logits: npt.NDArray[np.float32],
    drafted_round: RoundToVerify,
    accepts: Callable[[float, float, float], bool] = accepts,
) -> VerificationResult:
    """One round, token by token, in the paper's order; logits [draft_len + 1, V]."""
    if not drafted_round.rejection_sampling:
        return _verify_by_match(logits, drafted_round)
    if drafted_round.block_verification:
        return verify_block(logits, drafted_round)
    seed = drafted_round.sampling.seed
    for index, (token_id, sent) in enumerate(zip(drafted_round.drafted, drafted_round.distributions, strict=True)):
        target, draft = target_probs(logits[index], drafted_round.sampling), dense(sent)
        position = drafted_round.position + index
        if not accepts(uniform(seed, position, Stream.ACCEPT), target[token_id], draft[token_id]):
            return VerificationResult(
                index, sample_one(np.maximum(0, target - draft), uniform(seed, position, Stream.RESULT))
            )
    end = len(drafted_round.drafted)
    bonus = target_probs(logits[end], drafted_round.sampling)
    return VerificationResult(end, sample_one(bonus, uniform(seed, drafted_round.position + end, Stream.RESULT)))


def acceptance_thresholds(
    targets: Sequence[Probs], drafts: Sequence[Probs], drafted: Sequence[int]
) -> tuple[list[float], list[float]]:
    """p_i and h_i for 0 ≤ i ≤ γ, as in algorithm 2 of arXiv:2403.10444; h_0 is 1, as no fewer can be accepted.

    ``targets`` are γ + 1 distributions, ``drafts`` γ.
    """
    joint, thresholds = [1.0], [1.0]
    for index, token_id in enumerate(drafted):
        joint.append(min(1.0, joint[-1] * targets[index][token_id] / drafts[index][token_id]))
        threshold = joint[-1]
        if index + 1 < len(drafted):
            mass = float(np.maximum(0, joint[-1] * targets[index + 1] - drafts[index + 1]).sum())
            threshold = mass / (mass + 1 - joint[-1]) if mass else 0.0
        thresholds.append(threshold)
    return joint, thresholds


def verify_block(logits: npt.NDArray[np.float32], drafted_round: RoundToVerify) -> VerificationResult:
    """One round by the joint probability of its tokens, in the order of algorithm 2 of arXiv:2403.10444."""
    one, seed = drafted_round, drafted_round.sampling.seed
    targets, drafts = [target_probs(row, one.sampling) for row in logits], [*map(dense, one.distributions)]
    joint, thresholds = acceptance_thresholds(targets, drafts, one.drafted)
    accepted = 0
    for index in range(1, len(thresholds)):
        if uniform(seed, one.position + index - 1, Stream.ACCEPT, one.position) < thresholds[index]:
            accepted = index
    weights = targets[accepted]
    if accepted < len(one.drafted):
        weights = np.maximum(0, joint[accepted] * weights - drafts[accepted])
    return VerificationResult(accepted, sample_one(weights, uniform(seed, one.position + accepted, Stream.RESULT)))


def _verify_by_match(logits: npt.NDArray[np.float32], drafted_round: RoundToVerify) -> VerificationResult:
    target_ids = [
        _target_token(row, drafted_round.sampling, drafted_round.position + index) for index, row in enumerate(logits)
    ]
    return VerificationResult(*_longest_match(target_ids, drafted_round.drafted))


def _target_token(logits: npt.NDArray[np.float32], sampling: Sampling, position: int) -> int:
    if sampling.greedy:
        return int(logits.argmax())
    with np.errstate(divide="ignore"):
        scores = np.log(target_probs(logits, sampling))
    noise = PositionNoise(sampling.seed, position, len(logits)).of(np.arange(len(logits)))
    return int((scores + noise).argmax())


def _longest_match(target_ids: Sequence[int], drafted: Sequence[int]) -> tuple[int, int]:
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == target_ids[accepted]:
        accepted += 1
    return accepted, target_ids[accepted]
