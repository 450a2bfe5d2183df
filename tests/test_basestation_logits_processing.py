"""Sampling settings that change the target's logits: the rows of a round, and the distribution of what is emitted."""

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import chisquare

from basestation.verification.logits_processing import AnswerSoFar, MaskTime, process_logits
from basestation.verification.verify import RoundToVerify, VerificationResult, verify_rounds
from common.grammar import Grammar
from device.drafting import logits_processing
from device.drafting.sampling import coupled_token, full_distribution, sparse_distribution
from device.settings import UplinkSettings
from protocol.messages import Mode, Sampling
from protocol.randomness import Stream, random_bits
from tests.fakes import blend, next_logits, random_table
from tests.p_values import FALSE_ALARM
from tests.slow_sampling import slow_logits
from tests.slow_verify import target_probs

VOCAB = 6
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.6)
PROMPT = [2, 1, 2]
STOPS = frozenset({3})
SETTINGS = {
    "bias": Sampling(1.0, logit_bias=((0, 1.5), (4, -2.0))),
    "repetition": Sampling(1.0, repetition_penalty=1.8),
    "presence": Sampling(1.0, presence_penalty=1.5),
    "frequency": Sampling(0.8, frequency_penalty=-1.2),
    "min_p": Sampling(1.3, min_p=0.25),
    "min_tokens": Sampling(1.0, min_tokens=2),
    "all": Sampling(
        0.9,
        top_k=5,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias=((1, 1.0),),
        min_tokens=1,
    ),
}
every_setting = pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)


def slow_row(table: npt.NDArray[np.float32], sampling: Sampling, answer: list[int]) -> npt.NDArray[np.float64]:
    return slow_logits(next_logits(table, [*PROMPT, *answer]), sampling, PROMPT, answer, set(STOPS))


@every_setting
def test_every_row_of_a_round_is_that_of_the_slow_twin_on_both_ends(sampling: Sampling) -> None:
    committed, drafted = [0, 0, 4], [1, 4, 0, 2]
    expected = np.stack([slow_row(TARGET, sampling, committed + drafted[:row]) for row in range(5)])
    rows = [next_logits(TARGET, [*PROMPT, *committed, *drafted[:row]]) for row in range(5)]
    logits = torch.tensor(np.stack(rows))
    process_logits(logits, sampling, AnswerSoFar([*PROMPT, *committed], len(PROMPT), STOPS), drafted, MaskTime(0))
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5)
    for index, row in enumerate(rows):
        tokens = [*PROMPT, *committed, *drafted[:index]]
        device = logits_processing.process_logits(row, sampling, tokens, len(PROMPT), STOPS)
        np.testing.assert_allclose(device, expected[index], rtol=1e-5)


def test_settings_that_change_nothing_leave_the_logits_as_they_are() -> None:
    logits = next_logits(TARGET, PROMPT)
    assert logits_processing.process_logits(logits, Sampling(0.7, 3, 0.9, 1), PROMPT, 3, STOPS) is logits


class CountingGrammar:
    """A grammar that allows everything, and counts the tokens it moves over."""

    def __init__(self) -> None:
        self.moves: list[int] = []

    def follow(self, tokens: list[int], seconds: float) -> bool:
        self.moves.append(len(tokens))
        return True

    def advance(self, token_id: int) -> bool:
        self.moves.append(1)
        return token_id != 2

    def allowed(self) -> npt.NDArray[np.bool_]:
        return np.ones(VOCAB, np.bool_)


def test_a_round_moves_a_grammar_once_over_the_answer_and_once_over_each_drafted_token() -> None:
    grammar = CountingGrammar()
    answer = AnswerSoFar([*PROMPT, *[0] * 100], len(PROMPT), STOPS, cast(Grammar, grammar))
    process_logits(torch.zeros(6, VOCAB), Sampling(grammar="x"), answer, [0, 1, 2, 0, 1], MaskTime(1))
    assert grammar.moves == [100, 1, 1, 1]


class TimedGrammar(CountingGrammar):
    """A grammar that takes as much as it wants of the time that it gets."""

    def __init__(self, clock: list[float], wanted: float) -> None:
        super().__init__()
        self.allotted = 0.0
        self._clock = clock
        self._wanted = wanted

    def follow(self, tokens: list[int], seconds: float) -> bool:
        self.allotted = seconds
        self._clock[0] += min(seconds, self._wanted)
        return True


@pytest.mark.parametrize(("wanted", "last"), [(1.0, 0.1 / 32), (0.0, 0.1)], ids=["all they get", "nothing"])
def test_the_grammars_of_a_pass_share_its_time(wanted: float, last: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("basestation.verification.logits_processing.time.thread_time", lambda: clock[0])
    grammars = [TimedGrammar(clock, wanted) for _ in range(16)]
    answers = [AnswerSoFar(PROMPT, len(PROMPT), STOPS, cast(Grammar, one)) for one in grammars]
    rounds = [RoundToVerify(Sampling(grammar="x"), len(PROMPT), answer=answer) for answer in answers]
    verify_rounds(torch.zeros(16, VOCAB), rounds)
    assert clock[0] <= 0.1 + 1e-9
    assert min(one.allotted for one in grammars) >= 0.1 / 32 - 1e-9
    assert grammars[-1].allotted == pytest.approx(last)


def exact_pairs(sampling: Sampling) -> npt.NDArray[np.float64]:
    """The probability of each pair of tokens after the prompt, [V, V]."""
    plain = Sampling(sampling.temperature, sampling.top_k, sampling.top_p)
    first = target_probs(slow_row(TARGET, sampling, []), plain)
    return np.stack([first[one] * target_probs(slow_row(TARGET, sampling, [one]), plain) for one in range(VOCAB)])


def round_of(mode: Mode, sampling: Sampling, answer: list[int], draft: bool) -> RoundToVerify:
    """The round of a device that drafts one token, or none, after ``answer``."""
    tokens = [*PROMPT, *answer]
    so_far = AnswerSoFar(tokens, len(PROMPT), STOPS)
    rejection = mode.encoding is not None
    if not draft:
        return RoundToVerify(sampling, len(tokens), rejection_sampling=rejection, answer=so_far)
    row = next_logits(DRAFT, tokens)
    logits = logits_processing.process_logits(row, sampling, tokens, len(PROMPT), STOPS)
    if not rejection:
        drafted = coupled_token(logits, sampling, len(tokens))[0]
        return RoundToVerify(sampling, len(tokens), (drafted,), answer=so_far)
    sent = (
        full_distribution(logits, sampling)
        if mode is Mode.FULL
        else sparse_distribution(logits, sampling, UplinkSettings(4, 1.0, 96))
    )
    drafted = sent.sample(random_bits(sampling.seed, len(tokens), Stream.DRAFT))
    return RoundToVerify(sampling, len(tokens), (drafted,), (sent,), rejection, so_far)


def verified(rounds: list[RoundToVerify]) -> list[VerificationResult]:
    rows = []
    for one in rounds:
        assert one.answer is not None
        tokens = [*one.answer.tokens, *one.drafted]
        rows += [next_logits(TARGET, tokens[: len(tokens) - left]) for left in reversed(range(one.num_logits))]
    return verify_rounds(torch.tensor(np.stack(rows)), rounds)


def emitted_pairs(mode: Mode, sampling: Sampling, count: int) -> list[tuple[int, int]]:
    """The first two tokens of ``count`` answers with different seeds."""
    samplings = [replace(sampling, seed=seed) for seed in range(count)]
    rounds = [round_of(mode, one, [], draft=True) for one in samplings]
    emitted = [
        [*one.drafted[: result.accepted], result.token_id] for one, result in zip(rounds, verified(rounds), strict=True)
    ]
    short = [index for index, tokens in enumerate(emitted) if len(tokens) == 1]
    if short:
        second = verified([round_of(mode, samplings[index], emitted[index], draft=False) for index in short])
        for index, result in zip(short, second, strict=True):
            emitted[index].append(result.token_id)
    return [(tokens[0], tokens[1]) for tokens in emitted]


@pytest.mark.parametrize("mode", [Mode.TOPK, Mode.FULL, Mode.COUPLED])
@every_setting
def test_emitted_tokens_are_distributed_as_the_targets_own(mode: Mode, sampling: Sampling) -> None:
    count, exact = 1500, exact_pairs(sampling)
    seen = Counter(emitted_pairs(mode, sampling, count))
    observed = np.array([[seen[one, two] for two in range(VOCAB)] for one in range(VOCAB)])
    assert observed[exact == 0].sum() == 0
    likely = exact * count >= 5
    rest = [(observed[~likely].sum(), exact[~likely].sum() * count)] if exact[~likely].sum() * count >= 5 else []
    counts = [*observed[likely], *(count for count, _ in rest)]
    expected = np.array([*(exact[likely] * count), *(share for _, share in rest)])
    assert chisquare(counts, expected * sum(counts) / expected.sum()).pvalue > FALSE_ALARM


def test_the_distribution_test_sees_a_missing_setting() -> None:
    """The settings change the distribution, so that the test above could fail."""
    plain = exact_pairs(Sampling(1.0))
    for one, other in product(SETTINGS.values(), repeat=2):
        assert one is other or not np.allclose(exact_pairs(one), exact_pairs(other), atol=0.02)
        assert not np.allclose(exact_pairs(one), plain, atol=0.02)
