"""The keys and values of all pages of the KV pool: one tensor a layer, allocated once.

Knows tensors and page numbers; not which sequence uses a page.
"""

import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from basestation.kv_cache.kv_pool import PAGE_SIZE
from basestation.kv_cache.memory import map_memory

_CUDA_PAGE_SIZE = 256
"""FlashAttention 2 reads pages of multiples of 256 positions."""


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

    @property
    def page_size(self) -> int:
        """Positions of a page."""
        return _CUDA_PAGE_SIZE if self.torch_device.type == "cuda" else PAGE_SIZE

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.page_size * self.position_bytes


class KVPages:
    """Keys and values of ``count`` pages, as [kv_heads, positions, head_size] in each layer.

    The positions of page p are those from p · page_size on. In memory, a CPU has all
    positions of a head one after the other, as its attention reads them fastest; CUDA's
    kernels read [pages, page_size, kv_heads, head_size].

    Raises:
        OSError: there is not enough memory; so do ``torch.OutOfMemoryError`` and ``RuntimeError`` say.

    Attributes:
        shape: of a position.
        count: pages in total.
        keys: of each layer.
        values: of each layer.
    """

    def __init__(self, shape: KVShape, count: int) -> None:
        self.shape, self.count = shape, count
        self._memory: mmap.mmap | None = None
        positions = count * shape.page_size
        if shape.torch_device.type == "cpu":
            self._memory = map_memory(self.bytes)
            size = (shape.layers, 2, shape.kv_heads, positions, shape.head_size)
            memory = torch.frombuffer(self._memory, dtype=shape.dtype).view(size)
        else:
            size = (shape.layers, 2, positions, shape.kv_heads, shape.head_size)
            memory = torch.empty(size, dtype=shape.dtype, device=shape.torch_device).transpose(2, 3)
        self._cached = memory
        self.keys: tuple[Tensor, ...] = memory[:, 0].unbind()
        self.values: tuple[Tensor, ...] = memory[:, 1].unbind()

    @property
    def bytes(self) -> int:
        """Memory of all pages."""
        return self.count * self.shape.page_bytes

    def tables(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer as [pages, page_size, kv_heads, head_size]."""
        size = (self.count, self.shape.page_size, self.shape.kv_heads, self.shape.head_size)
        return self.keys[layer].transpose(0, 1).view(size), self.values[layer].transpose(0, 1).view(size)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [kv_heads, n, head_size] of one layer to the positions ``slots`` [n] of the pool."""
        self.keys[layer].index_copy_(1, slots, keys)
        self.values[layer].index_copy_(1, slots, values)

    def clear(self, positions: range) -> None:
        """Zero the keys and values of positions of the pool, in all layers."""
        self._cached[..., positions.start : positions.stop, :] = 0

    def discard(self, pages: range) -> None:
        """Return the memory of pages that became free to the system, where it is mapped; their content is lost."""
        if self._memory is None:
            return
        head = self.bytes // (self.shape.layers * 2 * self.shape.kv_heads)
        page = head // self.count
        for start in range(0, self.bytes, head):
            first = -(-(start + pages.start * page) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (start + pages.stop * page) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < end:
                self._memory.madvise(mmap.MADV_DONTNEED, first, end - first)
