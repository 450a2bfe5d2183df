"""Keys and values of many sessions, and attention over them in one forward pass.

A pass is one flat row of tokens from any number of sessions, without padding.
transformers calls ``packed_attention`` in every layer; it writes the row's new
keys and values into each session's own stretch and attends over that stretch
alone. A stretch is shortened by lowering its length: nothing is copied.

Knows shapes and tensors, not sessions, messages or what is judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ATTENTION_NAME = "edgedraft_packed"
_STEP = 128


@dataclass(frozen=True)
class StretchShape:
    """What one token's keys and values take: ``layers`` × 2 × ``kv_heads`` × ``head_size`` of ``dtype``."""

    layers: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    torch_device: torch.device

    @property
    def position_bytes(self) -> int:
        """Bytes of one position."""
        return self.layers * 2 * self.kv_heads * self.head_size * self.dtype.itemsize

    def allocate(self, capacity: int) -> Tensor:
        """An empty tensor [layers, 2, kv_heads, capacity, head_size]."""
        return torch.empty(
            (self.layers, 2, self.kv_heads, capacity, self.head_size), dtype=self.dtype, device=self.torch_device
        )


class Arena:
    """Room for the keys and values of all sessions, bounded by a budget.

    Args:
        shape: what a position takes.
        capacity: positions in all.

    Attributes:
        used: positions that stretches hold room for.
    """

    def __init__(self, shape: StretchShape, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.shape = shape

    @property
    def free(self) -> int:
        """Positions that no stretch holds."""
        return self.capacity - self.used

    @staticmethod
    def rounded(length: int) -> int:
        """The room that ``length`` positions take: stretches grow by steps."""
        return -(-length // _STEP) * _STEP


class Stretch:
    """The keys and values of one session: the first ``length`` positions count.

    Attributes:
        capacity: positions it holds room for.
    """

    def __init__(self, arena: Arena) -> None:
        self.length = 0
        self.capacity = 0
        self._arena = arena
        self._keys_values = arena.shape.allocate(0)

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions."""
        if length <= self.capacity:
            return
        grown = self._arena.shape.allocate(Arena.rounded(length))
        grown[:, :, :, : self.length] = self._keys_values[:, :, :, : self.length]
        self._keep(grown)

    def release(self) -> None:
        """Forget everything and give the room back."""
        self.length = 0
        self._keep(self._arena.shape.allocate(0))

    def rollback(self, length: int) -> None:
        """Forget all positions from ``length`` on."""
        self.length = min(self.length, length)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [kv_heads, n, head_size] behind the counted positions; give all up to there, the new ones included."""
        end = self.length + keys.shape[1]
        stored = self._keys_values[layer]
        stored[0, :, self.length : end] = keys
        stored[1, :, self.length : end] = values
        return stored[0, :, :end], stored[1, :, :end]

    def _keep(self, keys_values: Tensor) -> None:
        capacity = keys_values.shape[3]
        self._arena.used += capacity - self.capacity
        self._keys_values, self.capacity = keys_values, capacity


@dataclass(frozen=True)
class Segment:
    """One session's part of a pass: ``token_ids`` to run, logits of the last ``judged`` of them wanted."""

    stretch: Stretch
    token_ids: Sequence[int]
    judged: int


class PackedPass:
    """The layout of one pass, handed by transformers to ``packed_attention`` in every layer."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        for segment in segments:
            segment.stretch.reserve(segment.stretch.length + len(segment.token_ids))

    def mask(self, index: int, window: int | None, query: Tensor) -> Tensor | None:
        """What is added to the scores of a segment's ``query`` [kv_heads, group · n, head_size]: [group · n, past + n].

        0 for all positions before a token and its own, at most ``window`` back, -inf
        for others; None where nothing is hidden.
        """
        if (index, window) not in self._masks:
            self._masks[index, window] = self._make_mask(self.segments[index], window, query)
        return self._masks[index, window]

    @staticmethod
    def _make_mask(segment: Segment, window: int | None, query: Tensor) -> Tensor | None:
        past, new = segment.stretch.length, len(segment.token_ids)
        if new == 1 and (window is None or past < window):
            return None
        position = torch.arange(past, past + new, device=query.device)[:, None]
        key = torch.arange(past + new, device=query.device)[None, :]
        hidden = key > position if window is None else (key > position) | (key <= position - window)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)
        return mask.repeat(query.shape[1] // new, 1)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_pass: PackedPass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, in the form that ``transformers.AttentionInterface`` calls.

    ``query`` is [1, heads, T, head_size], ``key`` and ``value`` [1, kv_heads, T, head_size]
    for the T tokens of the whole pass; the result is [1, T, heads, head_size].
    The heads that share keys are one head with more rows: so no key is read twice.
    """
    heads, head_size = query.shape[1], query.shape[3]
    rows, start = [], 0
    for index, segment in enumerate(packed_pass.segments):
        end = start + len(segment.token_ids)
        keys, values = segment.stretch.store(module.layer_idx, key[0, :, start:end], value[0, :, start:end])
        grouped = query[0, :, start:end].reshape(len(keys), -1, head_size)
        mask = packed_pass.mask(index, sliding_window, grouped)
        mixed = scaled_dot_product_attention(grouped[None], keys[None], values[None], attn_mask=mask, scale=scaling)
        rows.append(mixed.reshape(heads, end - start, head_size))
        start = end
    return torch.cat(rows, dim=1).transpose(0, 1)[None], None
