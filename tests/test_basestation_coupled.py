"""Mode ``coupled``: the answer is the target's own sampling with the same seed, for any draft."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from basestation.verification import coupled_sampling, target_sampling
from basestation.verification.target_sampling import SamplingRow, sample_target_tokens
from basestation.verification.verify import RoundToVerify, VerificationResult, verify_rounds
from device.settings import DraftSettings
from protocol.coupling import noise_keys
from protocol.messages import Mode, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, Table, blend, next_logits, random_table
from tests.link_pair import MemoryTransport, Station, join, open_session
from tests.p_values import FALSE_ALARM
from tests.slow_verify import target_probs

VOCAB = 40
TARGET = random_table(VOCAB, seed=3)
DRAFTS = {"similar": blend(TARGET, random_table(VOCAB, seed=4), 0.9), "different": random_table(VOCAB, seed=5)}
SAMPLINGS = (
    Sampling(1.0, seed=1),
    Sampling(0.6, seed=2),
    Sampling(1.2, top_k=20, seed=3),
    Sampling(1.0, top_p=0.7, seed=4),
)
SAMPLES = 200_000


def answer(draft: Table, mode: Mode, sampling: Sampling, draft_len: int = 4) -> tuple[list[int], int, int]:
    model = FakeDraftModel.make(draft)
    station = Station(FakeTarget.make(TARGET))
    client, _ = join(station, model, MemoryTransport(station))
    session = open_session(client, DraftSettings(mode, sampling, 8, draft_len), model, [3, 1, 4])
    tokens = [token.token_id for token in session.answer(40)]
    return tokens, session.counters.accepted, session.counters.drafted


@pytest.mark.parametrize(("kind", "sampling", "draft_len"), list(product(DRAFTS, SAMPLINGS, (1, 4, 8))))
def test_coupled_answers_are_the_targets_own_with_the_same_seed(kind: str, sampling: Sampling, draft_len: int) -> None:
    coupled, _, _ = answer(DRAFTS[kind], Mode.COUPLED, sampling, draft_len)
    assert coupled == answer(DRAFTS[kind], Mode.TARGET, sampling)[0]


def test_another_seed_gives_another_answer() -> None:
    draft = DRAFTS["similar"]
    assert answer(draft, Mode.COUPLED, Sampling(1.0, seed=1)) != answer(draft, Mode.COUPLED, Sampling(1.0, seed=2))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_similar_draft_is_mostly_accepted(sampling: Sampling) -> None:
    _, accepted, drafted = answer(TARGET, Mode.COUPLED, sampling)
    assert accepted > 0.95 * drafted
    _, accepted, drafted = answer(DRAFTS["different"], Mode.COUPLED, sampling)
    assert accepted < 0.5 * drafted


def test_verification_stops_at_the_first_difference() -> None:
    own, sampling = [3, 1, 4, 1], Sampling(1.0)
    logits = torch.nn.functional.one_hot(torch.tensor(own), VOCAB).float() * 1e6
    for drafted, result in (([3, 1, 4], (3, 1)), ([3, 0, 4], (1, 1)), ([], (0, 3))):
        rows = logits[: len(drafted) + 1]
        assert verify_rounds(rows, [RoundToVerify(sampling, 9, drafted)]) == [VerificationResult(*result)]


def test_rows_of_all_settings_are_sampled_as_each_alone() -> None:
    logits = torch.tensor(np.array([next_logits(TARGET, (1, token)) for token in range(VOCAB)]))
    samplings = [*SAMPLINGS, Sampling(), Sampling(0.6, seed=9), Sampling(1.2, top_k=20, seed=8)]
    sampling_rows = [SamplingRow(samplings[row % len(samplings)], row) for row in range(VOCAB)]
    alone = [int(sample_target_tokens(logits[row : row + 1], [one])) for row, one in enumerate(sampling_rows)]
    assert sample_target_tokens(logits, sampling_rows).tolist() == alone


def p_value(sampling: Sampling, samples: int) -> float:
    """Of a chi-squared test on sequences of three tokens; each token is sampled at a position of its own."""
    size = 6
    table = random_table(size, seed=1)
    rows = torch.tensor(table.reshape(-1, size))
    exact = np.array([target_probs(row, sampling) for row in table.reshape(-1, size)]).reshape(size, size, size)
    before, last = torch.zeros(samples, dtype=torch.int64), torch.ones(samples, dtype=torch.int64)
    cells = torch.zeros(samples, dtype=torch.int64)
    for step in range(3):
        sampling_rows = [SamplingRow(sampling, position) for position in range(step * samples, (step + 1) * samples)]
        choices = sample_target_tokens(rows[before * size + last], sampling_rows)
        before, last, cells = last, choices, cells * size + choices
    expected = np.einsum("a,ab,abc->abc", exact[0, 1], exact[1], exact).ravel() * samples
    counts = np.bincount(cells.cpu().numpy(), minlength=size**3)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    return float(chisquare(counts[possible], expected[possible]).pvalue)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.6), Sampling(1.3, top_p=0.8)], ids=str)
def test_coupled_sequences_are_distributed_as_the_targets_own(sampling: Sampling) -> None:
    assert p_value(sampling, SAMPLES) > FALSE_ALARM


def repeat_noise_across_positions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        target_sampling,
        "noise_keys",
        lambda seeds, positions: noise_keys(seeds, [position % (SAMPLES // 10) for position in positions]),
    )


def block_maxima_of_single_tokens(patch: pytest.MonkeyPatch) -> None:
    make = coupled_sampling._Noise.__init__

    def init(noise: coupled_sampling._Noise, keys: torch.Tensor, vocab_size: int) -> None:
        make(noise, keys, vocab_size)
        noise.maxima -= np.log(vocab_size)  # the whole vocabulary is one block

    patch.setattr(coupled_sampling._Noise, "__init__", init)


def coarse_noise(patch: pytest.MonkeyPatch) -> None:
    uniform = coupled_sampling._Noise._uniform
    patch.setattr(coupled_sampling._Noise, "_uniform", lambda *index: ((uniform(*index) * 4).floor() + 0.5) / 4)


@pytest.mark.parametrize("defect", [repeat_noise_across_positions, block_maxima_of_single_tokens, coarse_noise])
def test_planted_defects_of_the_noise_are_detected(
    defect: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    defect(monkeypatch)
    assert p_value(Sampling(1.0), SAMPLES // 10) < 1e-7
