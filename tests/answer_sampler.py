"""Answers of three tokens, drafted and verified for many seeds at once, against their exact distribution.

Drafts are sampled and verified with the functions that device and base station use, through the encoded bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import chisquare

from basestation.verification.verify import RoundToVerify, VerificationResult, verify_rounds
from device.drafting.sampling import full_distribution, sparse_distribution
from device.settings import UplinkSettings
from protocol.frames import FrameCodec
from protocol.messages import Draft, DraftDistribution, Sampling
from protocol.randomness import UNIFORM_BITS, WORD_BITS, Stream, random_words
from protocol.sparse import MAX_STEPS
from tests.fakes import blend, random_table
from tests.slow_verify import target_probs

VOCAB = 6
PROMPT = (1,)
LENGTH = 3
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


BLOCK = Case(VOCAB, draft_len=3, block_verification=True)


class Sampler:
    """Samples sequences as device and base station do; a planted defect replaces one part."""

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
