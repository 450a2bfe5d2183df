"""Block verification: lossless, and accepts more tokens."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import numpy.typing as npt
import torch

from basestation.verification.verify import RoundToVerify, VerificationResult, verify_rounds
from protocol.messages import Sampling
from protocol.sparse import SparseDistribution
from tests.answer_sampler import BLOCK, DRAFT, TARGET, VOCAB, Logits, Sampler
from tests.slow_verify import acceptance_thresholds, target_probs


class AcceptedCounter(Sampler):
    """Counts rounds and accepted tokens."""

    rounds = accepted = 0

    def verify(self, logits: Logits, rounds: Sequence[RoundToVerify]) -> list[VerificationResult]:
        results = super().verify(logits, rounds)
        self.rounds += len(results)
        self.accepted += sum(one.accepted for one in results)
        return results


def test_block_verification_accepts_more_tokens() -> None:
    """At least as many by the theorem of arXiv:2403.10444, clearly more here."""
    accepted = []
    for block_verification in (False, True):
        counter = AcceptedCounter(replace(BLOCK, draft_len=6, block_verification=block_verification))
        counter.sequences(np.arange(4000))
        accepted.append(counter.accepted / counter.rounds)
    assert accepted[1] > 1.02 * accepted[0]


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
