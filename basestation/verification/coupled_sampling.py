"""Coupled sampling: the shared noise of ``protocol.coupling``, for many positions at once, on the model's device.

Computes the same integers, noise and choice as ``PositionNoise``.
"""

import torch
from torch import Tensor

from protocol.coupling import BLOCK, SLACK, hash32


def coupled_choice(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
    """The token with the largest score plus noise, for each row: int64 [n].

    Examines the same blocks and tokens as ``PositionNoise.choose``, for all rows at once.

    Args:
        logits: [n, V], -inf for tokens that must not be sampled.
        temperatures: [n], float64; scores are logits divided by it.
        keys: of each row's noise, ``noise_keys`` of its seed and of its token's position: int64 [2, n].
    """
    rows, vocab_size = logits.shape
    width = min(BLOCK, vocab_size)
    noise = _Noise(keys, vocab_size)
    padding = -vocab_size % width
    padded = torch.nn.functional.pad(logits, (0, padding), value=-torch.inf) if padding else logits
    grid = padded.view(rows, -1, width)
    row, scale = torch.arange(rows, device=logits.device), temperatures[:, None]
    largest = grid.amax(dim=2)
    likely = (largest / scale + noise.maxima).argmax(dim=1)
    tokens = likely[:, None] * BLOCK + torch.arange(width, device=logits.device)
    best = (grid[row, likely] / scale + noise.of(row[:, None], tokens)).amax(dim=1, keepdim=True)
    needed = ((best - noise.maxima - SLACK) * scale).to(logits.dtype)  # [n, blocks]
    near_row, near_block = (largest >= needed).nonzero(as_tuple=True)
    near = grid[near_row, near_block]
    near_index, offset = (near >= needed[near_row, near_block][:, None]).nonzero(as_tuple=True)
    rival_row, rival = near_row[near_index], near_block[near_index] * BLOCK + offset
    sums = near[near_index, offset] / temperatures[rival_row] + noise.of(rival_row, rival)
    winning = torch.full((rows,), -torch.inf, dtype=sums.dtype, device=logits.device)
    wins = sums == winning.scatter_reduce(0, rival_row, sums, "amax")[rival_row]
    winners = torch.where(wins, rival, 0)  # no token wins in a row with NaN
    return torch.zeros_like(row).scatter_reduce_(0, rival_row, winners, "amax")


class _Noise:
    """Noise of n positions; ``PositionNoise`` documents the hashed indices."""

    def __init__(self, keys: Tensor, vocab_size: int) -> None:
        self._low, self._high = keys
        block = torch.arange(-(-vocab_size // BLOCK), device=keys.device)
        sizes = (vocab_size - block * BLOCK).clamp(max=BLOCK)
        self._blocks = len(block)
        row = torch.arange(len(self._low), device=keys.device)[:, None]
        self.maxima = sizes.double().log() - (-self._uniform(row, block).log()).log()  # [n, blocks]
        peaks = hash32(block + self._blocks, self._low[row], self._high[row]) * sizes >> 32
        self._peaks = block * BLOCK + peaks

    def of(self, row: Tensor, token_ids: Tensor) -> Tensor:
        """The noise of ``token_ids`` at the positions of ``row``; the two broadcast."""
        block = token_ids // BLOCK
        maxima = self.maxima[row, block]
        below = -((-maxima).exp() - self._uniform(row, token_ids + 2 * self._blocks).log()).log()
        return torch.where(token_ids == self._peaks[row, block], maxima, below)

    def _uniform(self, row: Tensor, index: Tensor) -> Tensor:
        hashes: Tensor = hash32(index, self._low[row], self._high[row])
        return (hashes.double() + 0.5) * 2.0**-32
