"""The shared noise of ``protocol.coupling`` for many positions at once, as tensors on the model's device.

The same integers, the same noise and the same choice as ``PositionNoise``,
which is the slow and obvious twin in the tests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.coupling import BLOCK, SLACK, hash32, noise_key


def coupled_choice(scores: Tensor, seed: int, positions: Sequence[int]) -> Tensor:
    """For each row the token with the largest score plus noise: int64 [n].

    Args:
        scores: [n, V], unnormalised log probabilities, -inf for what may not be drawn.
        seed: of the session.
        positions: of the n tokens in the whole sequence.
    """
    rows, vocab_size = scores.shape
    width, blocks = min(BLOCK, vocab_size), -(-vocab_size // BLOCK)
    noise = _Noise(seed, positions, vocab_size, scores.device)
    padded = torch.nn.functional.pad(scores, (0, blocks * width - vocab_size), value=-torch.inf)
    grid = padded.view(rows, blocks, width)
    bounds = grid.amax(dim=2) + noise.maxima
    likely = bounds.argmax(dim=1, keepdim=True) * BLOCK + torch.arange(width, device=scores.device)
    row = torch.arange(rows, device=scores.device)
    sums = padded.gather(1, likely) + noise.of(row[:, None], likely.clamp(max=vocab_size - 1))
    needed = sums.amax(dim=1, keepdim=True) - noise.maxima - SLACK  # [n, blocks]
    rival_row, rival_block, offset = (grid >= needed[:, :, None]).nonzero(as_tuple=True)
    rival = rival_block * BLOCK + offset
    rival_sums = scores[rival_row, rival] + noise.of(rival_row, rival)
    largest = torch.full((rows,), -torch.inf, dtype=rival_sums.dtype, device=scores.device)
    largest = largest.scatter_reduce(0, rival_row, rival_sums, "amax")
    winners = rival_sums == largest[rival_row]
    return torch.empty(rows, dtype=torch.int64, device=scores.device).scatter_(0, rival_row[winners], rival[winners])


class _Noise:
    """Noise of n positions; see ``PositionNoise`` for what is hashed."""

    def __init__(self, seed: int, positions: Sequence[int], vocab_size: int, torch_device: torch.device) -> None:
        keys = torch.tensor([noise_key(seed, position) for position in positions], device=torch_device)
        self._low, self._high = keys[:, 0], keys[:, 1]
        block = torch.arange(-(-vocab_size // BLOCK), device=torch_device)
        sizes = (vocab_size - block * BLOCK).clamp(max=BLOCK)
        self._blocks = len(block)
        row = torch.arange(len(positions), device=torch_device)[:, None]
        self.maxima = sizes.double().log() - (-self._uniform(row, block).log()).log()  # [n, blocks]
        places = hash32(block + self._blocks, self._low[row], self._high[row]) * sizes >> 32
        self._peaks = block * BLOCK + places

    def of(self, row: Tensor, token_ids: Tensor) -> Tensor:
        """The noise of tokens at the positions of ``row``, which broadcasts to their shape."""
        maxima = self.maxima[row, token_ids // BLOCK]
        below = -((-maxima).exp() - self._uniform(row, token_ids + 2 * self._blocks).log()).log()
        return torch.where(token_ids == self._peaks[row, token_ids // BLOCK], maxima, below)

    def _uniform(self, row: Tensor, index: Tensor) -> Tensor:
        return (hash32(index, self._low[row], self._high[row]).double() + 0.5) * 2.0**-32
