"""Losslessness: sequences of three tokens against their exact distribution.

Drafts are sampled and verified with the functions that device and base station
use, through the encoded bytes, for many seeds at once. Planted defects show that
the test can fail, and ``verify_one`` is the slow and obvious twin.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import chisquare

from basestation.verification import verify
from basestation.verification.target_sampling import SamplingRow, sample_target_tokens, target_weights, warp_scores
from basestation.verification.verify import RoundToVerify, VerificationResult, verify_rounds
from device.drafting.sampling import full_distribution, sparse_distribution
from device.settings import UplinkSettings
from protocol.frames import FrameCodec
from protocol.messages import Draft, DraftDistribution, Sampling
from protocol.randomness import UNIFORM_BITS, WORD_BITS, Stream, random_words, uniforms
from protocol.sparse import MAX_STEPS, SparseDistribution
from tests.fakes import blend, random_table
from tests.slow_verify import acceptance_thresholds, dense, sample_one, target_probs, uniform, verify_one

VOCAB = 6
SAMPLES = 50_000
DETECTED_AFTER = 20_000
"""Samples after which each planted defect is detected."""
PROMPT = (1,)
LENGTH = 3
FALSE_ALARM = 1e-4  # planted defects must have a far smaller p-value
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.5)

CODEC = FrameCodec(VOCAB)

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
State = tuple[int, int]
"""The last two tokens, which the next one's logits depend on; 0 before the first."""


@dataclass(frozen=True)
class Case:
    """How to draft and sample; probabilities are sent in steps of 1/``steps``, or for 0 as all V in FP16."""

    uplink_k: int
    temperature: float = 1.0
    top_p: float = 1.0
    draft_len: int = 2
    steps: int = MAX_STEPS
    uplink_p: float = 1.0
    block_verification: bool = False

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, top_p=self.top_p)


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
]
BLOCK = Case(VOCAB, draft_len=3, block_verification=True)
CASES += [
    BLOCK,
    replace(BLOCK, temperature=0.6, uplink_k=1),
    replace(BLOCK, temperature=1.3, top_p=0.8),
    replace(BLOCK, steps=0),
    replace(BLOCK, uplink_k=4, steps=8),
]


class Sampler:
    """Samples sequences as device and base station do; each defect below replaces one part."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.sent = cache(self._sent)

    def sampling_distribution(self, state: State) -> DraftDistribution:
        return self.sent(state)

    def verifying_distribution(self, state: State) -> DraftDistribution:
        return self.sent(state)

    def verify(self, logits: Logits, rounds: Sequence[RoundToVerify]) -> list[VerificationResult]:
        return verify_rounds(torch.tensor(logits), rounds)

    def sequences(self, seeds: Ids) -> Ids:
        """[n, LENGTH], one sequence per seed."""
        end = len(PROMPT) + LENGTH
        tokens = np.zeros((len(seeds), end + self.case.draft_len + 1), np.int64)  # [:, 0]: before the prompt
        tokens[:, 1 : 1 + len(PROMPT)] = PROMPT
        lengths = np.full(len(seeds), len(PROMPT))
        while (unfinished := np.flatnonzero(lengths < end)).size:
            for length in np.unique(lengths[unfinished]):
                rows = unfinished[lengths[unfinished] == length]
                tokens[rows], lengths[rows] = self.round(tokens[rows], int(length), seeds[rows])
        return tokens[:, 1 + len(PROMPT) : 1 + end]

    def round(self, tokens: Ids, length: int, seeds: Ids) -> tuple[Ids, Ids]:
        """Draft and verify after the first ``length`` tokens; returns the tokens and their new lengths."""
        draft_len = self.case.draft_len
        for position in range(length, length + draft_len):
            tokens[:, 1 + position] = self.sample(tokens[:, position - 1 : position + 1], seeds, position, length)
        states = np.stack([tokens[:, length + index - 1 : length + index + 1] for index in range(draft_len + 1)], 1)
        logits = TARGET[states[..., 0], states[..., 1]].reshape(-1, VOCAB)
        sent = np.empty((VOCAB, VOCAB), object)
        for before, last in product(range(VOCAB), repeat=2):
            sent[before, last] = self.verifying_distribution((before, last))
        distributions = sent[states[:, :-1, 0], states[:, :-1, 1]]
        drafted = tokens[:, 1 + length : 1 + length + draft_len]
        rounds = [
            RoundToVerify(
                Sampling(self.case.temperature, top_p=self.case.top_p, seed=seed),
                length,
                ids,
                row,
                rejection_sampling=True,
                block_verification=self.case.block_verification,
            )
            for seed, ids, row in zip(seeds.tolist(), drafted.tolist(), distributions.tolist(), strict=True)
        ]
        results = self.verify(logits, rounds)
        accepted = np.array([one.accepted for one in results])
        tokens[np.arange(len(tokens)), 1 + length + accepted] = [one.token_id for one in results]
        return tokens, length + accepted + 1

    def sample(self, states: Ids, seeds: Ids, position: int, first: int) -> Ids:
        """``SparseDistribution.sample`` for many seeds."""
        positions = np.full(len(seeds), position)
        words = random_words(seeds, positions, Stream.DRAFT, self.first_drafted(first))
        bits = words >> np.uint64(WORD_BITS - UNIFORM_BITS)
        sampled = np.empty(len(seeds), np.int64)
        for state in np.unique(states, axis=0):
            rows = (states == state).all(axis=1)
            ids, starts = thresholds_of(self.sampling_distribution((int(state[0]), int(state[1]))))
            sampled[rows] = ids[starts.searchsorted(bits[rows].astype(np.int64), side="right") - 1]
        return sampled

    def first_drafted(self, position: int) -> int | None:
        """What the numbers of drafted tokens depend on besides seed and position."""
        return position if self.case.block_verification else None

    def p_value(self, samples: int) -> float:
        """Of a chi-squared test on ``samples`` sequences; rare ones are pooled into one cell."""
        counts = np.zeros((VOCAB,) * LENGTH)
        np.add.at(counts, tuple(self.sequences(np.arange(samples)).T), 1)
        expected = np.zeros_like(counts)
        for sequence, probability in self.exact((0, *PROMPT)):
            expected[sequence] = probability * samples
        rare = expected < 5
        observed = np.append(counts[~rare], counts[rare].sum())
        expected_counts = np.append(expected[~rare], expected[rare].sum())
        if expected_counts[-1] == 0:
            assert observed[-1] == 0, "an impossible sequence was sampled"
            observed, expected_counts = observed[:-1], expected_counts[:-1]
        return float(chisquare(observed, expected_counts).pvalue)

    def exact(self, tokens: tuple[int, ...], probability: float = 1.0) -> Iterator[tuple[tuple[int, ...], float]]:
        if len(tokens) == 1 + len(PROMPT) + LENGTH:
            yield tokens[1 + len(PROMPT) :], probability
            return
        row = target_probs(TARGET[tokens[-2], tokens[-1]], self.case.sampling)
        for token_id in range(VOCAB):
            yield from self.exact((*tokens, token_id), probability * float(row[token_id]))

    def drafted(self, state: State, uplink: UplinkSettings) -> DraftDistribution:
        return sparse_distribution(DRAFT[state], self.case.sampling, uplink)

    def _sent(self, state: State) -> DraftDistribution:
        distribution: DraftDistribution = full_distribution(DRAFT[state], self.case.sampling)
        if self.case.steps:
            distribution = self.drafted(state, UplinkSettings(self.case.uplink_k, self.case.uplink_p, self.case.steps))
        draft = Draft(0, 1, (int(distribution.support[distribution.weights.argmax()]),), (distribution,))
        arrived = CODEC.decode(CODEC.encode(draft))
        assert isinstance(arrived, Draft)
        return arrived.distributions[0]


@cache
def starts_of(support: tuple[int, ...], ends: tuple[int, ...], total: int) -> tuple[Ids, Ids]:
    firsts = [0, *(-(-end * 2**UNIFORM_BITS // total) for end in ends[:-1])]
    return np.array(support), np.array(firsts)


def thresholds_of(distribution: DraftDistribution) -> tuple[Ids, Ids]:
    """The tokens a distribution can sample, and the smallest random number that samples each.

    ``sample`` is monotonic, so checking these numbers and the ones just below determines it.
    """
    possible = distribution.weights > 0
    weights = distribution.weights[possible]
    ids, starts = starts_of(
        tuple(distribution.support[possible].tolist()), tuple(weights.cumsum().tolist()), distribution.total
    )
    for index in range(len(ids)):
        assert distribution.sample(int(starts[index])) == ids[index]
        assert index == 0 or distribution.sample(int(starts[index]) - 1) == ids[index - 1]
    return ids, starts


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


def test_block_verification_accepts_more_tokens() -> None:
    """At least as many by the theorem of arXiv:2403.10444, clearly more here."""
    accepted = []
    for block_verification in (False, True):
        counter = AcceptedCounter(replace(BLOCK, draft_len=6, block_verification=block_verification))
        counter.sequences(np.arange(4000))
        accepted.append(counter.accepted / counter.rounds)
    assert accepted[1] > 1.02 * accepted[0]


class AcceptedCounter(Sampler):
    """Counts rounds and accepted tokens."""

    rounds = accepted = 0

    def verify(self, logits: Logits, rounds: Sequence[RoundToVerify]) -> list[VerificationResult]:
        results = super().verify(logits, rounds)
        self.rounds += len(results)
        self.accepted += sum(one.accepted for one in results)
        return results


def test_the_exact_distribution_after_block_verification_is_the_targets_own() -> None:
    """All drafts and acceptance decisions of the slow twin are enumerated, weighted by their probabilities."""
    draft_len, sampling = 3, Sampling(0.9)
    output = np.zeros((VOCAB,) * (draft_len + 1))
    for drafted in product(range(VOCAB), repeat=draft_len):
        tokens = (0, 1, *drafted)
        states = [tokens[index : index + 2] for index in range(draft_len + 1)]
        targets = [target_probs(TARGET[state], sampling) for state in states]
        drafts = [target_probs(DRAFT[state], sampling) for state in states[:-1]]
        joint, thresholds = acceptance_thresholds(targets, drafts, drafted)
        probability = np.prod([one[token_id] for one, token_id in zip(drafts, drafted, strict=True)])
        for accepted in range(draft_len, -1, -1):
            weights = joint[accepted] * targets[accepted] - (drafts[accepted] if accepted < draft_len else 0)
            residual = np.maximum(0, weights)
            recovered = residual / (residual.sum() or 1.0)
            for token_id in np.flatnonzero(recovered):
                committed = (*drafted[:accepted], int(token_id))
                output[committed] += (
                    probability * thresholds[accepted] * recovered[token_id] * after(committed, draft_len + 1, sampling)
                )
            probability *= 1 - thresholds[accepted]
    np.testing.assert_allclose(output, after((), draft_len + 1, sampling), rtol=1e-9)


def after(tokens: tuple[int, ...], length: int, sampling: Sampling) -> npt.NDArray[np.float64]:
    """The target's distribution of the tokens from ``tokens`` up to ``length``: [VOCAB] for each."""
    if len(tokens) == length:
        return np.ones(())
    probs = target_probs(TARGET[(0, 1, *tokens)[-2:]], sampling)
    return np.stack([probs[token_id] * after((*tokens, token_id), length, sampling) for token_id in range(VOCAB)])


def test_rows_after_an_impossible_token_do_not_count_in_block_verification() -> None:
    sent = SparseDistribution(3, np.array([0, 1]), np.array([2, 2]), 4)
    possible, excluded = [0.0, 1.0, 2.0], [-torch.inf, 0.0, 0.0]
    one = RoundToVerify(Sampling(1.0, seed=3), 5, [1, 0, 1], [sent] * 3, True, block_verification=True)
    expected = verify_rounds(torch.tensor([possible, excluded, possible, possible]), [one])
    assert expected[0].finite
    assert expected[0].accepted <= 1
    for bad in (-torch.inf, torch.nan, torch.inf):
        assert verify_rounds(torch.tensor([possible, excluded, [bad] * 3, possible]), [one]) == expected
        assert not verify_rounds(torch.tensor([possible, [bad] * 3, possible, possible]), [one])[0].finite


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


@pytest.mark.parametrize("vocab_size", [40, 700, 6000])
def test_top_p_keeps_the_lowest_ids_of_equal_probabilities_whatever_the_batch(vocab_size: int) -> None:
    levels = torch.arange(vocab_size) % 3
    expected = target_probs(levels.float().cpu().numpy(), Sampling(1.0, top_p=0.4)) > 0
    for rows in (1, 7, 64):
        kept = warp_scores(levels.float().expand(rows, -1), 0, 0.4).isfinite()
        assert (kept.cpu().numpy() == expected).all()


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
