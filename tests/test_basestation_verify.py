"""Losslessness: sequences of three tokens against their exact distribution.

Planted defects show that the test can fail, and ``verify_one`` is the slow and obvious twin.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

from basestation.verification import verify
from basestation.verification.target_sampling import SamplingRow, sample_target_tokens, target_weights, warp_scores
from basestation.verification.verify import RoundToVerify, VerificationResult, verify_rounds
from device.drafting.sampling import full_distribution, sparse_distribution
from device.settings import UplinkSettings
from protocol.messages import DraftDistribution, Sampling
from protocol.randomness import UNIFORM_BITS, Stream, uniforms
from protocol.sparse import MAX_STEPS, SparseDistribution
from tests.answer_sampler import BLOCK, VOCAB, Case, Logits, Sampler, State
from tests.p_values import FALSE_ALARM
from tests.slow_verify import acceptance_thresholds, dense, sample_one, target_probs, uniform, verify_one

SAMPLES = 50_000
DETECTED_AFTER = 20_000
"""Samples after which each planted defect is detected."""
CASES = [
    *(Case(k, temperature) for k, temperature in product((1, 4, VOCAB), (0.6, 1.0))),
    Case(4, 1.0, top_p=0.8),
    Case(VOCAB, 1.3, top_p=0.8, draft_len=3),
    Case(VOCAB, steps=0),
    Case(VOCAB, 0.6, steps=0),
    Case(VOCAB, 1.0, top_p=0.8, steps=0),
    Case(4, steps=96),
    Case(4, steps=8),
    Case(VOCAB, steps=2),
    Case(VOCAB, uplink_p=0.7, steps=40),
    Case(4, 0.6, top_p=0.9, uplink_p=0.95, steps=5),
    BLOCK,
    replace(BLOCK, temperature=0.6, uplink_k=1),
    replace(BLOCK, temperature=1.3, top_p=0.8),
    replace(BLOCK, steps=0),
    replace(BLOCK, uplink_k=4, steps=8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sampled_answers_are_distributed_as_the_targets_own(case: Case) -> None:
    assert Sampler(case).p_value(SAMPLES) > FALSE_ALARM


class TruncatesAfterSampling(Sampler):
    """Samples from all of Q and truncates afterwards; the verifier uses the truncated Q."""

    def sampling_distribution(self, state: State) -> DraftDistribution:
        return self.drafted(state, UplinkSettings(VOCAB, 1.0, MAX_STEPS))


class VerifiesUnrounded(Sampler):
    """Verifies against Q before rounding instead of the Q that was sampled from."""

    def verifying_distribution(self, state: State) -> DraftDistribution:
        return self.drafted(state, UplinkSettings(self.case.uplink_k, self.case.uplink_p, MAX_STEPS))


class RecoversFromTarget(Sampler):
    """Samples the recovered token from P instead of the residual."""

    def verify(self, logits: Logits, rounds: Sequence[RoundToVerify]) -> list[VerificationResult]:
        results, start = [], 0
        for result, one in zip(super().verify(logits, rounds), rounds, strict=True):
            probs = target_probs(logits[start + result.accepted], one.sampling)
            number = uniform(one.sampling.seed, one.position + result.accepted, Stream.RESULT)
            results.append(VerificationResult(result.accepted, sample_one(probs, number)))
            start += one.num_logits
        return results


class AcceptsByInverse(Sampler):
    """Accepts by Q/P instead of P/Q."""

    def verify(self, logits: Logits, rounds: Sequence[RoundToVerify]) -> list[VerificationResult]:
        parts = np.split(logits, np.cumsum([one.num_logits for one in rounds])[:-1])
        inverse = partial(verify_one, accepts=lambda number, target, draft: number * target < draft)
        return [inverse(part, one) for part, one in zip(parts, rounds, strict=True)]


class NumbersByPosition(Sampler):
    """In block verification, drafts and accepts with numbers of (seed, position) alone."""

    def first_drafted(self, position: int) -> None:
        return None

    def verify(self, logits: Logits, rounds: Sequence[RoundToVerify]) -> list[VerificationResult]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verify, "uniforms", lambda seeds, positions, stream, _: uniforms(seeds, positions, stream))
            return super().verify(logits, rounds)


class RecoversWrongly(Sampler):
    """Samples the recovered token from the residual of the other kind of verification."""

    def verify(self, logits: Logits, rounds: Sequence[RoundToVerify]) -> list[VerificationResult]:
        results, start = [], 0
        for result, one in zip(super().verify(logits, rounds), rounds, strict=True):
            accepted = result.accepted
            if accepted < len(one.drafted):
                targets = [target_probs(row, one.sampling) for row in logits[start : start + one.num_logits]]
                drafts = [*map(dense, one.distributions)]
                joint = (
                    1.0 if one.block_verification else acceptance_thresholds(targets, drafts, one.drafted)[0][accepted]
                )
                weights = np.maximum(0, joint * targets[accepted] - drafts[accepted])
                number = uniform(one.sampling.seed, one.position + accepted, Stream.RESULT)
                result = VerificationResult(accepted, sample_one(weights, number)) if weights.any() else result
            results.append(result)
            start += one.num_logits
        return results


@pytest.mark.parametrize(
    ("defect", "case"),
    [
        (NumbersByPosition, BLOCK),
        (RecoversWrongly, replace(BLOCK, block_verification=False)),
        (TruncatesAfterSampling, Case(4)),
        (RecoversFromTarget, Case(4)),
        (AcceptsByInverse, Case(4)),
        (VerifiesUnrounded, Case(4, steps=8)),
    ],
)
def test_planted_defects_are_detected(defect: type[Sampler], case: Case) -> None:
    assert defect(case).p_value(DETECTED_AFTER) < FALSE_ALARM / 1000


SAMPLINGS = (
    Sampling(1.0, seed=1),
    Sampling(0.6, seed=2),
    Sampling(1.2, top_k=9, seed=3),
    Sampling(0.9, top_p=0.7, seed=4),
    Sampling(1.5, top_k=12, top_p=0.8, seed=5),
)


def random_round(rng: np.random.Generator, logits: Logits) -> RoundToVerify:
    """A round of any kind, drafted as a device does, from logits [rows, V] similar to the target's."""
    kind, draft_len = rng.integers(4), len(logits) - 1
    sampling, position = SAMPLINGS[rng.integers(len(SAMPLINGS))], int(rng.integers(1, 1000))
    draft_logits = logits[:-1] + rng.normal(0, 0.7, logits[:-1].shape).astype(np.float32)
    if kind < 2:
        greedy = [int(one.argmax()) for one in draft_logits]
        return RoundToVerify(Sampling() if kind == 0 else sampling, position, greedy)
    distribution_of: Callable[[Logits], DraftDistribution] = partial(full_distribution, sampling=sampling)
    if kind == 3:
        distribution_of = partial(sparse_distribution, sampling=sampling, uplink=UplinkSettings(8, 1.0, 64))
    distributions = [distribution_of(one) for one in draft_logits]
    drafted = [one.sample(int(rng.integers(2**UNIFORM_BITS))) for one in distributions]
    assert len(drafted) == draft_len
    block_verification = bool(rng.integers(2))
    return RoundToVerify(
        sampling, position, drafted, distributions, rejection_sampling=True, block_verification=block_verification
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_batch_is_verified_as_each_round_alone_and_as_the_slow_twin_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(0, 2, (1 + int(rng.integers(0, 6)), 40)).astype(np.float32) for _ in range(12)]
    rounds = [random_round(rng, part) for part in parts]
    results = verify_rounds(torch.tensor(np.concatenate(parts)), rounds)
    alone = [verify_rounds(torch.tensor(part), [one])[0] for part, one in zip(parts, rounds, strict=True)]
    assert results == alone == [verify_one(part, one) for part, one in zip(parts, rounds, strict=True)]


def test_no_rounds_give_no_results() -> None:
    assert verify_rounds(torch.empty(0, VOCAB), []) == []


def test_a_drafted_token_outside_its_own_distribution_is_verified_with_q_0() -> None:
    sent = SparseDistribution(3, np.array([1]), np.array([4]), 4)
    likely, impossible = torch.tensor([[9.0, 0, 0], [0, 0, 9.0]]), torch.tensor([[-torch.inf, 0, 0], [0, 0, 9.0]])
    rounds = [RoundToVerify(Sampling(1.0), 5, [0], [sent], True)]
    assert verify_rounds(likely, rounds)[0].accepted == 1
    assert verify_rounds(impossible, rounds) == [VerificationResult(0, 2)]


def test_greedy_accepts_up_to_the_first_difference() -> None:
    logits = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])
    rows = [SamplingRow(Sampling(), position) for position in range(3)]
    assert sample_target_tokens(logits, rows).tolist() == [1, 2, 0]
    for drafted, result in (([1, 2], (2, 0)), ([1, 1], (1, 2)), ([0, 2], (0, 1))):
        assert verify_rounds(logits, [RoundToVerify(Sampling(), 7, drafted)]) == [VerificationResult(*result)]


def test_top_p_in_parts_keeps_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(50, 700, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    whole = warp_scores(scores, 0, 0.7)
    assert 0 < int(whole.isinf().sum()) < whole.numel()
    for rows in (1, 7, 50):
        monkeypatch.setattr("basestation.verification.target_sampling._TOP_P_NUMBERS", rows * 700 + 1)
        assert torch.equal(warp_scores(scores, 0, 0.7), whole)


@pytest.mark.parametrize("vocab_size", [40, 700, 6000, 150_000])
def test_what_top_p_keeps_of_equal_probabilities_does_not_depend_on_the_batch(vocab_size: int) -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    scores, others = torch.randn(2, vocab_size, generator=generator).round(), torch.randn(30, vocab_size)
    alone = warp_scores(scores, 0, 0.7)
    assert len(set(scores.flatten().tolist())) < 20
    for before in (0, 1, 29):
        batch = torch.cat([others[:before], scores, others[before:]])
        assert torch.equal(warp_scores(batch, 0, 0.7)[before : before + 2], alone)


def test_target_probabilities_after_temperature_top_k_and_top_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for sampling, kept in (
        (Sampling(1.0, top_p=0.8), [0.625, 0.375, 0, 0]),
        (Sampling(1.0, top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (Sampling(1.0, top_k=1), [1, 0, 0, 0]),
        (Sampling(0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    ):
        weights, totals = target_weights(logits, [sampling], [1])
        assert (weights / totals)[0].tolist() == pytest.approx(kept)
        assert target_probs(logits[0].cpu().numpy(), sampling) == pytest.approx(kept)
