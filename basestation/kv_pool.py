"""The KV caches of all sequences: memory for keys and values, bounded by a pool, with shared prefix blocks.

Each sequence has a contiguous tensor of its own. Rollback lowers its length and
copies nothing. Sequences with the same first tokens can share read-only blocks
of ``BLOCK_SIZE`` positions, counted by reference.

Knows shapes and tensors; not sessions, messages or attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from basestation.memory import map_pages

BLOCK_SIZE = 128
"""Positions of a shared block; capacities are multiples of it."""


@dataclass(frozen=True)
class KVShape:
    """Keys and values of one position: ``layers`` × 2 × ``kv_heads`` × ``head_size`` of ``dtype``."""

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
        """An uninitialised tensor [layers, 2, kv_heads, capacity, head_size]."""
        size = (self.layers, 2, self.kv_heads, capacity, self.head_size)
        if self.torch_device.type == "cpu" and capacity:
            return torch.frombuffer(map_pages(capacity * self.position_bytes), dtype=self.dtype).view(size)
        return torch.empty(size, dtype=self.dtype, device=self.torch_device)

    def copy_of(self, keys_values: Tensor) -> Tensor:
        """A newly allocated copy of ``keys_values``."""
        return self.allocate(keys_values.shape[3]).copy_(keys_values)


class KVPool:
    """The budget for the KV caches of all sequences.

    Args:
        shape: of one position.
        capacity: positions in total.

    Attributes:
        used: allocated positions; a shared block counts once.
        shared: positions saved by prefix sharing.
    """

    def __init__(self, shape: KVShape, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.shared = 0
        self.shape = shape

    @property
    def bytes(self) -> int:
        """Memory of all positions."""
        return self.capacity * self.shape.position_bytes

    @property
    def free(self) -> int:
        """Positions that are not allocated."""
        return self.capacity - self.used

    @staticmethod
    def round_up(length: int) -> int:
        """The capacity of a KV cache for ``length`` positions: the next multiple of ``BLOCK_SIZE``."""
        return -(-length // BLOCK_SIZE) * BLOCK_SIZE

    def acquire(self, block: "Block") -> None:
        """Add a reference to ``block``."""
        if block.ref_count:
            self.shared += BLOCK_SIZE
        else:
            self.used += BLOCK_SIZE
        block.ref_count += 1

    def release(self, block: "Block") -> None:
        """Remove a reference to ``block``; with the last one its positions are free."""
        block.ref_count -= 1
        if block.ref_count:
            self.shared -= BLOCK_SIZE
        else:
            self.used -= BLOCK_SIZE


class Block:
    """Keys and values of ``BLOCK_SIZE`` positions, read-only, shared by any number of sequences.

    Attributes:
        layers: one tensor [2, kv_heads, BLOCK_SIZE, head_size] per layer.
        ref_count: sequences that use it.
    """

    def __init__(self, keys_values: Tensor) -> None:
        self.layers = keys_values.unbind()
        self.ref_count = 0


class SequenceKVCache:
    """Keys and values of one sequence: shared prefix blocks, then a tensor of its own.

    Attributes:
        length: cached positions.
        blocks: its first positions, where they are shared.
    """

    def __init__(self, kv_pool: KVPool) -> None:
        self.length = 0
        self.blocks: list[Block] = []
        self._kv_pool = kv_pool
        self._own = kv_pool.shape.allocate(0)

    @property
    def capacity(self) -> int:
        """Allocated positions, those of the blocks included."""
        return self._own_start + self._own.shape[3]

    def reserve(self, length: int) -> None:
        """Grow the capacity to ``length`` positions or more."""
        if length <= self.capacity:
            return
        grown = self._kv_pool.shape.allocate(KVPool.round_up(length) - self._own_start)
        count = self.length - self._own_start
        grown[:, :, :, :count] = self._own[:, :, :, :count]
        self._replace_own(grown)

    def release(self) -> None:
        """Drop all positions and free their memory."""
        self.rollback(0)
        self._replace_own(self._kv_pool.shape.allocate(0))

    def rollback(self, length: int) -> None:
        """Drop the positions from ``length`` on; a block that is only partly kept is dropped whole."""
        self.length = min(self.length, length)
        while self.length < self._own_start:
            self._kv_pool.release(self.blocks.pop())
            self.length = min(self.length, self._own_start)

    def share_prefix(self, source: "SequenceKVCache", length: int) -> None:
        """Replace the content by the first ``length`` positions of ``source``, as blocks that both use.

        Args:
            source: a cache of the same first tokens.
            length: a multiple of ``BLOCK_SIZE``, at most the length of ``source``.
        """
        assert length <= source.length
        assert length % BLOCK_SIZE == 0
        source._convert_to_blocks(length // BLOCK_SIZE)
        self.release()
        self.blocks, self.length = source.blocks[: length // BLOCK_SIZE], length
        for block in self.blocks:
            self._kv_pool.acquire(block)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        """Write ``keys`` and ``values`` [kv_heads, n, head_size] of one layer after the cached positions.

        Returns:
            A view [2, kv_heads, m + n, head_size] of the m cached positions after the blocks and the n new ones.
        """
        start = self.length - self._own_start
        end = start + keys.shape[1]
        own = self._own[layer]
        own[0, :, start:end] = keys
        own[1, :, start:end] = values
        return own[:, :, :end]

    @property
    def _own_start(self) -> int:
        return len(self.blocks) * BLOCK_SIZE

    def _convert_to_blocks(self, count: int) -> None:
        """Move positions from the sequence's own tensor into blocks until there are ``count``."""
        missing = count - len(self.blocks)
        if missing <= 0:
            return
        copy_of = self._kv_pool.shape.copy_of
        blocks = [Block(copy_of(part)) for part in torch.split(self._own, BLOCK_SIZE, dim=3)[:missing]]
        self._replace_own(copy_of(self._own[:, :, :, missing * BLOCK_SIZE :]))
        for block in blocks:
            self._kv_pool.acquire(block)
        self.blocks += blocks

    def _replace_own(self, own: Tensor) -> None:
        self._kv_pool.used += own.shape[3] - self._own.shape[3]
        self._own = own
