"""Keys and values of many sessions, and attention over them in one forward pass.

A pass is one flat row of tokens from any number of sessions, without padding.
transformers calls ``packed_attention`` in every layer; it writes the row's new
keys and values into each session's own kv_cache and attends over that kv_cache
alone. A kv_cache is shortened by lowering its length: nothing is copied. Stretches
that begin with the same tokens can hold that beginning in common, in blocks.

Knows shapes and tensors, not sessions, messages or what is judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from basestation.memory import map_pages

ATTENTION_NAME = "edgedraft_packed"
STEP = 128
"""Positions by which kv_caches grow, and of a block."""


@dataclass(frozen=True)
class KVShape:
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
        size = (self.layers, 2, self.kv_heads, capacity, self.head_size)
        if self.torch_device.type == "cpu" and capacity:
            return torch.frombuffer(map_pages(capacity * self.position_bytes), dtype=self.dtype).view(size)
        return torch.empty(size, dtype=self.dtype, device=self.torch_device)

    def copied(self, keys_values: Tensor) -> Tensor:
        """What ``allocate`` gives, holding the same as ``keys_values``."""
        return self.allocate(keys_values.shape[3]).copy_(keys_values)


class KVPool:
    """Room for the keys and values of all sessions, bounded by a budget.

    Args:
        shape: what a position takes.
        capacity: positions in all.

    Attributes:
        used: positions that kv_caches hold room for; what several hold counts once.
        shared: positions that this saves.
    """

    def __init__(self, shape: KVShape, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.shared = 0
        self.shape = shape

    @property
    def free(self) -> int:
        """Positions that no kv_cache holds."""
        return self.capacity - self.used

    @staticmethod
    def rounded(length: int) -> int:
        """The room that ``length`` positions take: kv_caches grow by steps."""
        return -(-length // STEP) * STEP

    def hold(self, block: "Block") -> None:
        """Count another kv_cache that begins with ``block``."""
        if block.ref_count:
            self.shared += STEP
        else:
            self.used += STEP
        block.ref_count += 1

    def drop(self, block: "Block") -> None:
        """Count one less; with the last the block is gone."""
        block.ref_count -= 1
        if block.ref_count:
            self.shared -= STEP
        else:
            self.used -= STEP


class Block:
    """The keys and values of ``STEP`` positions that any number of kv_caches hold; nobody writes to them.

    Attributes:
        layers: [2, kv_heads, STEP, head_size] of each layer.
        ref_count: how many kv_caches hold it.
    """

    def __init__(self, keys_values: Tensor) -> None:
        self.layers = keys_values.unbind()
        self.ref_count = 0


class SequenceKVCache:
    """The keys and values of one session: the first ``length`` positions count.

    Attributes:
        blocks: its first positions, those that it holds in common with others.
    """

    def __init__(self, kv_pool: KVPool) -> None:
        self.length = 0
        self.blocks: list[Block] = []
        self._kv_pool = kv_pool
        self._own = kv_pool.shape.allocate(0)

    @property
    def capacity(self) -> int:
        """Positions it holds room for."""
        return self._own_start + self._own.shape[3]

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions."""
        if length <= self.capacity:
            return
        grown = self._kv_pool.shape.allocate(KVPool.rounded(length) - self._own_start)
        count = self.length - self._own_start
        grown[:, :, :, :count] = self._own[:, :, :, :count]
        self._keep(grown)

    def release(self) -> None:
        """Forget everything and give the room back."""
        self.rollback(0)
        self._keep(self._kv_pool.shape.allocate(0))

    def rollback(self, length: int) -> None:
        """Forget all positions from ``length`` on, and with them the whole of a block that they begin in."""
        self.length = min(self.length, length)
        while self.length < self._own_start:
            self._kv_pool.drop(self.blocks.pop())
            self.length = min(self.length, self._own_start)

    def join(self, source: "SequenceKVCache", length: int) -> None:
        """Begin as ``source`` does, whose first ``length`` positions, whole blocks, are held by both from now on."""
        assert length <= source.length
        assert length % STEP == 0
        source._share(length // STEP)
        self.release()
        self.blocks, self.length = source.blocks[: length // STEP], length
        for block in self.blocks:
            self._kv_pool.hold(block)

    def store(self, layer: int, keys: Tensor, values: Tensor, workspace: "Workspace") -> tuple[Tensor, Tensor]:
        """Write [kv_heads, n, head_size] behind the counted positions; give all up to there, the new ones included.

        What is given may lie in ``workspace`` and holds until that is used again.
        """
        start = self.length - self._own_start
        end = start + keys.shape[1]
        own = self._own[layer]
        own[0, :, start:end] = keys
        own[1, :, start:end] = values
        stored = own[:, :, :end]
        if self.blocks:
            stored = workspace.join(layer, self.blocks, stored)
        return stored[0], stored[1]

    @property
    def _own_start(self) -> int:
        return len(self.blocks) * STEP

    def _share(self, count: int) -> None:
        """Make blocks of the first positions until there are ``count``."""
        missing = count - len(self.blocks)
        if missing <= 0:
            return
        copied = self._kv_pool.shape.copied
        blocks = [Block(copied(part)) for part in torch.split(self._own, STEP, dim=3)[:missing]]
        self._keep(copied(self._own[:, :, :, missing * STEP :]))
        for block in blocks:
            self._kv_pool.hold(block)
        self.blocks += blocks

    def _keep(self, own: Tensor) -> None:
        self._kv_pool.used += own.shape[3] - self._own.shape[3]
        self._own = own


class Workspace:
    """One run of memory for what a session holds in blocks and has of its own, of one session and layer at a time.

    Blocks that the session before began with as well are there already.

    Args:
        capacity: positions of the longest session.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._keys_values: Tensor | None = None
        self._layer = -1
        self._blocks: list[Block] = []

    def join(self, layer: int, blocks: Sequence[Block], own: Tensor) -> Tensor:
        """The keys and values [2, kv_heads, n, head_size] of ``blocks``, and ``own`` behind them."""
        if self._keys_values is None:
            self._keys_values = own.new_empty((*own.shape[:2], self._capacity, own.shape[3]))
        if layer != self._layer:
            self._layer, self._blocks = layer, []
        pairs = zip(self._blocks, blocks, strict=False)
        there = sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], pairs))
        for index, block in enumerate(blocks[there:], start=there):
            self._keys_values[:, :, index * STEP : (index + 1) * STEP] = block.layers[layer]
        self._blocks = list(blocks)
        start = len(blocks) * STEP
        end = start + own.shape[2]
        self._keys_values[:, :, start:end] = own
        return self._keys_values[:, :, :end]


@dataclass(frozen=True)
class Segment:
    """One session's part of a pass: ``token_ids`` to run, logits of the last ``judged`` of them wanted."""

    kv_cache: SequenceKVCache
    token_ids: Sequence[int]
    num_logits: int


class PackedPass:
    """The layout of one pass, handed by transformers to ``packed_attention`` in every layer."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        for segment in segments:
            segment.kv_cache.reserve(segment.kv_cache.length + len(segment.token_ids))
        self.workspace = Workspace(max((one.kv_cache.capacity for one in segments if one.kv_cache.blocks), default=0))

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
        past, new = segment.kv_cache.length, len(segment.token_ids)
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
    for the T tokens of the whole pass, idle ones behind those of the segments; the result is [1, T, heads, head_size].
    The heads that share keys are one head with more rows: so no key is read twice.
    """
    heads, head_size = query.shape[1], query.shape[3]
    rows, start = [], 0
    for index, segment in enumerate(packed_pass.segments):
        end = start + len(segment.token_ids)
        new_keys, new_values = key[0, :, start:end], value[0, :, start:end]
        keys, values = segment.kv_cache.store(module.layer_idx, new_keys, new_values, packed_pass.workspace)
        grouped = query[0, :, start:end].reshape(len(keys), -1, head_size)
        mask = packed_pass.mask(index, sliding_window, grouped)
        mixed = scaled_dot_product_attention(grouped[None], keys[None], values[None], attn_mask=mask, scale=scaling)
        rows.append(mixed.reshape(heads, end - start, head_size))
        start = end
    rows.append(query.new_zeros(heads, query.shape[2] - start, head_size))
    return torch.cat(rows, dim=1).transpose(0, 1)[None], None
