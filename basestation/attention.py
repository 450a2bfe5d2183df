"""Attention over the KV caches of many sequences in one forward pass, without padding.

The tokens of a batch form one row. transformers calls ``packed_attention`` in
every layer; for each segment it appends the new keys and values to the
sequence's own KV cache and attends over that cache alone.

Knows segments and tensors; not sessions or verification.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from basestation.kv_pool import BLOCK_SIZE, Block
from basestation.segment import Segment

ATTENTION_NAME = "edgedraft_packed"


class Workspace:
    """A buffer that makes the blocks and the own tensor of a sequence contiguous, one sequence and layer at a time.

    Blocks that the previous sequence had too are not copied again.

    Args:
        capacity: positions of the longest sequence.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._keys_values: Tensor | None = None
        self._layer = -1
        self._blocks: list[Block] = []

    def concatenate(self, layer: int, blocks: Sequence[Block], own: Tensor) -> Tensor:
        """Keys and values [2, kv_heads, n, head_size] of ``blocks`` followed by ``own``; valid until the next call."""
        if not blocks:
            return own
        if self._keys_values is None:
            self._keys_values = own.new_empty((*own.shape[:2], self._capacity, own.shape[3]))
        if layer != self._layer:
            self._layer, self._blocks = layer, []
        pairs = zip(self._blocks, blocks, strict=False)
        present = sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], pairs))
        for index, block in enumerate(blocks[present:], start=present):
            self._keys_values[:, :, index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE] = block.layers[layer]
        self._blocks = list(blocks)
        start = len(blocks) * BLOCK_SIZE
        end = start + own.shape[2]
        self._keys_values[:, :, start:end] = own
        return self._keys_values[:, :, :end]


class PackedBatch:
    """The layout of one forward pass, which transformers hands to ``packed_attention`` in every layer.

    Reserves room for the new positions of every segment.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        for segment in segments:
            segment.kv_cache.reserve(segment.kv_cache.length + len(segment.token_ids))
        self.workspace = Workspace(max((one.kv_cache.capacity for one in segments if one.kv_cache.blocks), default=0))

    def mask(self, index: int, window: int | None, query: Tensor) -> Tensor | None:
        """The additive attention mask [group · n, past + n] of segment ``index``; None where nothing is masked.

        Args:
            index: of the segment.
            window: of sliding-window attention, in positions; None for full attention.
            query: [kv_heads, group · n, head_size].
        """
        if (index, window) not in self._masks:
            self._masks[index, window] = self._make_mask(self.segments[index], window, query)
        return self._masks[index, window]

    @staticmethod
    def _make_mask(segment: Segment, window: int | None, query: Tensor) -> Tensor | None:
        past, new = segment.kv_cache.length, len(segment.token_ids)
        if new == 1 and (window is None or past < window):
            return None
        position = torch.arange(past, past + new, device=query.device)[:, None]
        key = torch.arange(past + new, device=query.device)[None, :]
        masked = key > position if window is None else (key > position) | (key <= position - window)
        mask = torch.zeros(masked.shape, dtype=query.dtype, device=query.device).masked_fill_(masked, -torch.inf)
        return mask.repeat(query.shape[1] // new, 1)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_batch: PackedBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, with the signature that ``transformers.AttentionInterface`` requires.

    Args:
        module: the layer's attention module.
        query: [1, heads, T, head_size], the T tokens of all segments and then padding.
        key: [1, kv_heads, T, head_size].
        value: [1, kv_heads, T, head_size].
        attention_mask: unused; ``packed_batch`` makes the masks.
        packed_batch: the layout.
        scaling: of the scores.
        sliding_window: in positions, for layers with sliding-window attention.

    Returns:
        [1, T, heads, head_size], 0 for padding; and None for the attention weights.
    """
    heads, head_size = query.shape[1], query.shape[3]
    outputs, start = [], 0
    for index, segment in enumerate(packed_batch.segments):
        end = start + len(segment.token_ids)
        own = segment.kv_cache.store(module.layer_idx, key[0, :, start:end], value[0, :, start:end])
        keys, values = packed_batch.workspace.concatenate(module.layer_idx, segment.kv_cache.blocks, own)
        # GQA: fold a group's query heads into the rows of one SDPA call, so that each key is read once.
        grouped = query[0, :, start:end].reshape(len(keys), -1, head_size)
        mask = packed_batch.mask(index, sliding_window, grouped)
        output = scaled_dot_product_attention(grouped[None], keys[None], values[None], attn_mask=mask, scale=scaling)
        outputs.append(output.reshape(heads, end - start, head_size))
        start = end
    outputs.append(query.new_zeros(heads, query.shape[2] - start, head_size))
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None
