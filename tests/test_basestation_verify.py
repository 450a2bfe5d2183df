"""Losslessness: sequences of three tokens against their exact distribution.

Each sample drafts and judges with the functions that device and base station
use, through the bytes that would be sent. Planted defects show that the test
can fail.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from basestation.verify import Draw, Judgement, choose_tokens, draw, judge_sampled, match, residual_of, warp
from device.sampling import Uplink, draft_distribution, whole_distribution
from protocol.frames import FrameCodec
from protocol.messages import Draft, Sampling
from protocol.randomness import Stream, random_bits, uniform
from protocol.sparse import MAX_STEPS, SparseDistribution
from tests.fakes import blend, next_logits, random_table

VOCAB = 6
SAMPLES = 200_000
PROMPT = (1,)
LENGTH = 3
FALSE_ALARM = 1e-4  # a planted defect must be far below it
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.5)

CODEC = FrameCodec(VOCAB)

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """How to draft and sample; what is drafted is sent in steps of 1/``steps``, 0 being all V in FP16."""

    uplink_k: int
    temperature: float = 1.0
    top_p: float = 1.0
    draft_len: int = 2
    steps: int = MAX_STEPS
    uplink_p: float = 1.0

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


class Sampler:
    """Draws sequences as device and base station do; the defects below replace a part each."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.sent = lru_cache(maxsize=None)(self._sent)
        self.target_probs = lru_cache(maxsize=None)(self._target_probs)
        self.rows = lru_cache(maxsize=None)(self._rows)

    def drafted(self, tokens: Tokens, uplink: Uplink) -> SparseDistribution:
        return draft_distribution(next_logits(DRAFT, tokens), self.case.sampling, uplink)

    def unrounded(self, tokens: Tokens) -> SparseDistribution:
        return self.drafted(tokens, Uplink(self.case.uplink_k, self.case.uplink_p, MAX_STEPS))

    def draft(self, tokens: Tokens, seed: int) -> int:
        return self.sent(tokens).sample(random_bits(seed, len(tokens), Stream.DRAFT))

    def judge(self, tokens: Tokens, drafted: Tokens, seed: int) -> Judgement:
        distributions = [self.sent((*tokens, *drafted[:index])) for index in range(len(drafted))]
        return judge_sampled(self.rows(tokens, drafted), drafted, distributions, seed, len(tokens))

    def _rows(self, tokens: Tokens, drafted: Tokens) -> torch.Tensor:
        return torch.cat([self.target_probs((*tokens, *drafted[:index])) for index in range(len(drafted) + 1)])

    def sequence(self, seed: int) -> Tokens:
        tokens: Tokens = PROMPT
        while len(tokens) < len(PROMPT) + LENGTH:
            drafted: Tokens = ()
            for _ in range(self.case.draft_len):
                drafted = (*drafted, self.draft((*tokens, *drafted), seed))
            judgement = self.judge(tokens, drafted, seed)
            tokens = (*tokens, *drafted[: judgement.accepted], judgement.token_id)
        return tokens[len(PROMPT) : len(PROMPT) + LENGTH]

    def p_value(self, samples: int) -> float:
        """Of the chi-squared test of ``samples`` sequences; rare ones are pooled into one cell."""
        counts = np.zeros((VOCAB,) * LENGTH)
        for seed in range(samples):
            counts[self.sequence(seed)] += 1
        expected = np.zeros_like(counts)
        for sequence, probability in self.exact(PROMPT):
            expected[sequence] = probability * samples
        rare = expected < 5
        observed = np.append(counts[~rare], counts[rare].sum())
        wanted = np.append(expected[~rare], expected[rare].sum())
        if wanted[-1] == 0:
            assert observed[-1] == 0, "an impossible sequence was drawn"
            observed, wanted = observed[:-1], wanted[:-1]
        return float(chisquare(observed, wanted).pvalue)

    def exact(self, tokens: Tokens, probability: float = 1.0) -> Iterator[tuple[Tokens, float]]:
        if len(tokens) == len(PROMPT) + LENGTH:
            yield tokens[len(PROMPT) :], probability
            return
        row = self.target_probs(tokens)[0]
        for token_id in range(VOCAB):
            yield from self.exact((*tokens, token_id), probability * float(row[token_id]))

    def _sent(self, tokens: Tokens) -> SparseDistribution:
        if self.case.steps == 0:
            distribution = whole_distribution(next_logits(DRAFT, tokens), self.case.sampling)
        else:
            distribution = self.drafted(tokens, Uplink(self.case.uplink_k, self.case.uplink_p, self.case.steps))
        draft = Draft(0, 1, (int(distribution.support[distribution.weights.argmax()]),), (distribution,))
        arrived = CODEC.decode(CODEC.encode(draft))
        assert isinstance(arrived, Draft)
        return arrived.distributions[0]

    def _target_probs(self, tokens: Tokens) -> torch.Tensor:
        return warp(torch.tensor(next_logits(TARGET, tokens))[None], self.case.sampling)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sampled_answers_are_distributed_as_the_targets_own(case: Case) -> None:
    assert Sampler(case).p_value(SAMPLES) > FALSE_ALARM


class CutAfterSampling(Sampler):
    """Draws from all of Q and cuts afterwards; the verifier takes the cut Q for what was drawn from."""

    def draft(self, tokens: Tokens, seed: int) -> int:
        return self.drafted(tokens, Uplink(VOCAB, 1.0, MAX_STEPS)).sample(random_bits(seed, len(tokens), Stream.DRAFT))


class RecoversFromTarget(Sampler):
    """Draws the recovered token from the target itself instead of the residual."""

    def judge(self, tokens: Tokens, drafted: Tokens, seed: int) -> Judgement:
        accepted = super().judge(tokens, drafted, seed).accepted
        number = uniform(seed, len(tokens) + accepted, Stream.RESULT)
        return Judgement(accepted, draw(self.rows(tokens, drafted)[accepted], number))


class AcceptsByInverse(Sampler):
    """Accepts by Q/P where P/Q is right."""

    def judge(self, tokens: Tokens, drafted: Tokens, seed: int) -> Judgement:
        rows = self.rows(tokens, drafted)
        for index, token_id in enumerate(drafted):
            position, sent = len(tokens) + index, self.sent((*tokens, *drafted[:index]))
            if uniform(seed, position, Stream.ACCEPT) * float(rows[index, token_id]) >= sent.probability(token_id):
                return Judgement(index, draw(residual_of(rows[index], sent), uniform(seed, position, Stream.RESULT)))
        return Judgement(len(drafted), draw(rows[-1], uniform(seed, len(tokens) + len(drafted), Stream.RESULT)))


class VerifiesUnrounded(Sampler):
    """Verifies against what the device had before rounding, not against what it drew from."""

    def judge(self, tokens: Tokens, drafted: Tokens, seed: int) -> Judgement:
        unrounded = [self.unrounded((*tokens, *drafted[:index])) for index in range(len(drafted))]
        return judge_sampled(self.rows(tokens, drafted), drafted, unrounded, seed, len(tokens))


@pytest.mark.parametrize(
    ("defect", "case"),
    [
        (CutAfterSampling, Case(4)),
        (RecoversFromTarget, Case(4)),
        (AcceptsByInverse, Case(4)),
        (VerifiesUnrounded, Case(4, steps=8)),
    ],
)
def test_planted_defects_are_caught(defect: type[Sampler], case: Case) -> None:
    assert defect(case).p_value(SAMPLES // 10) < FALSE_ALARM / 1000


def test_greedy_accepts_up_to_the_first_difference() -> None:
    logits = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])
    target_ids = choose_tokens(logits, [Draw(Sampling(), position) for position in range(3)])
    assert match(target_ids, [1, 2]) == Judgement(2, 0)
    assert match(target_ids, [1, 1]) == Judgement(1, 2)
    assert match(target_ids, [0, 2]) == Judgement(0, 1)


def test_warp_keeps_the_nucleus_and_no_more() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert warp(logits, Sampling(1.0, top_p=0.8))[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert warp(logits, Sampling(1.0, top_p=0.81))[0].tolist() == pytest.approx(
        [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]
    )
    assert warp(logits, Sampling(1.0, top_k=1))[0].tolist() == [1, 0, 0, 0]
    assert warp(logits, Sampling(0.5))[0].tolist() == pytest.approx(
        [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]
    )
