"""Gumbel coupling: standard Gumbel noise, the same on both ends, and choices distributed as softmax."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from basestation.verification.coupled_sampling import coupled_choice
from protocol.coupling import BLOCK, MAX_MARGIN, PositionNoise, hash32, noise_keys
from tests.p_values import FALSE_ALARM

KNOWN_HASHES = [3405767568, 3507691905, 3568491650, 1864612511]
SIZES = (2, 5, BLOCK - 1, BLOCK, BLOCK + 1, 700, 5000)


def scores_of(vocab_size: int, seed: int, rows: int = 4) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab_size)).astype(np.float32)


def tensor_choice(scores: torch.Tensor, seed: int, positions: Sequence[int]) -> list[int]:
    """The base station's choices at temperature 1."""
    temperatures = torch.ones(len(scores)).double()
    keys = torch.as_tensor(noise_keys([seed] * len(scores), positions), device=scores.device)
    choices: list[int] = coupled_choice(scores, temperatures, keys).tolist()
    return choices


def full_choice(scores: np.ndarray[tuple[int], np.dtype[np.float32]], seed: int, position: int) -> tuple[int, float]:
    sums = scores + PositionNoise(seed, position, len(scores)).of(np.arange(len(scores)))
    second, first = np.sort(sums)[-2:]
    return int(sums.argmax()), min(float(first - second), MAX_MARGIN)


def test_the_noise_is_standard_gumbel() -> None:
    drawn = np.concatenate([PositionNoise(3, position, 1000).of(np.arange(1000)) for position in range(200)])
    assert kstest(drawn, "gumbel_r").pvalue > FALSE_ALARM


def test_the_largest_noise_of_a_block_is_unique() -> None:
    for position in range(50):
        noise = PositionNoise(1, position, 700).of(np.arange(700))
        for start in range(0, 700, BLOCK):
            block = noise[start : start + BLOCK]
            assert np.sort(block)[-1] > np.sort(block)[-2]


@pytest.mark.parametrize("vocab_size", SIZES)
def test_lazy_choice_equals_the_choice_among_all_tokens(vocab_size: int) -> None:
    for position in range(40):
        scores = scores_of(vocab_size, position)[0]
        assert PositionNoise(9, position, vocab_size).choose(scores) == full_choice(scores, 9, position)


@pytest.mark.parametrize("vocab_size", SIZES)
def test_both_ends_choose_the_same_token(vocab_size: int) -> None:
    scores = scores_of(vocab_size, 1, rows=30)
    scores[:, ::3] = -np.inf
    scores[:, 0] = 0
    choices = tensor_choice(torch.tensor(scores), 7, range(100, 130))
    assert choices == [full_choice(row, 7, 100 + index)[0] for index, row in enumerate(scores)]


def test_tokens_of_probability_0_are_never_chosen() -> None:
    scores = np.full((50, 600), -np.inf, np.float32)
    scores[:, 599] = -5.0
    assert set(tensor_choice(torch.tensor(scores), 1, range(50))) == {599}
    assert {PositionNoise(1, position, 600).choose(scores[0]) for position in range(50)} == {(599, MAX_MARGIN)}


def test_choices_are_distributed_as_softmax() -> None:
    probs = np.array([0.4, 0.3, 0.2, 0.07, 0.03])
    scores = torch.tensor(np.log(probs)).expand(20_000, 5)
    counts = np.bincount(tensor_choice(scores, 11, range(20_000)), minlength=5)
    assert chisquare(counts, probs * 20_000).pvalue > FALSE_ALARM


@given(st.integers(0, 2**31), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_the_hash_is_the_same_in_numpy_and_torch(index: int, low: int, high: int) -> None:
    numbers = hash32(np.array([index]), low, high)
    assert numbers.tolist() == hash32(torch.tensor([index]), low, high).tolist()
    assert 0 <= numbers[0] < 2**32


def test_the_hash_has_known_values() -> None:
    assert hash32(np.array([0, 1, 2, 49151]), 1, 2).tolist() == KNOWN_HASHES


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_both_ends_choose_the_same_token_at_any_temperature(temperature: float) -> None:
    logits = scores_of(700, seed=2, rows=30)
    seeds, positions = range(30), range(10, 40)
    keys = torch.tensor(noise_keys(seeds, positions))
    choices = coupled_choice(torch.tensor(logits), torch.full((30,), temperature).double(), keys).tolist()
    for row, seed, position, choice in zip(logits, seeds, positions, choices, strict=True):
        assert PositionNoise(seed, position, 700).choose(row, temperature)[0] == choice
        assert full_choice(row / np.float32(temperature), seed, position)[0] == choice
