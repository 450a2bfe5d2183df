"""Attention over the KV pages of many sequences in one forward pass, without padding.

The tokens of a pass form one row. transformers calls ``packed_attention`` in every
layer; it writes the new keys and values to their pages, and each sequence attends
over its own pages alone.

Knows passes and pages; not sessions or verification.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from basestation.kv_cache.kv_pages import KVPages
from basestation.kv_cache.kv_pool import runs
from basestation.target.forward_pass import ForwardPass

ATTENTION_NAME = "edgedraft_packed"


@dataclass(frozen=True, slots=True)
class _Visible:
    """The positions that a sequence's new tokens can see, from the start of a page on.

    Attributes:
        length: how many there are, the new ones included.
        runs: the runs of pages that hold them.
        mask: additive [group · n, length], None where nothing is masked.
    """

    length: int
    runs: list[range]
    mask: Tensor | None


class PackedBatch(Protocol):
    """The layout of one forward pass, which transformers hands to ``packed_attention`` in every layer.

    Attributes:
        windows: that the layers so far had.
    """

    windows: set[int | None]

    @property
    def gathered(self) -> int:
        """How many sequences were read from a copy of their pages."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """Write the new keys and values of one layer to their pages, and attend over the pages.

        Args:
            layer: its index.
            query: [heads, T, head_size], of all tokens and then padding.
            key: [kv_heads, T, head_size].
            value: [kv_heads, T, head_size].
            scaling: of the scores.
            window: of sliding-window attention, in positions; None for full attention.

        Returns:
            [heads, T, head_size], 0 for padding.
        """


class SequentialBatch:
    """A ``PackedBatch`` with one SDPA call per sequence, for every device and dtype.

    It reads the pages of a sequence in place where they are one run, and otherwise a copy of them.

    Args:
        forward_pass: that it is for.
        kv_pages: that the pass reads and writes.
        placed: its ``layout``, on the device of the pages.
    """

    def __init__(self, forward_pass: ForwardPass, kv_pages: KVPages, placed: Sequence[Tensor]) -> None:
        self._pass = forward_pass
        self._kv_pages = kv_pages
        self._page_size = kv_pages.shape.page_size
        self._visible: dict[tuple[int, int | None], _Visible] = {}
        (self._slots,) = placed
        self._workspace = Workspace(kv_pages)
        self.windows: set[int | None] = set()

    @staticmethod
    def layout(forward_pass: ForwardPass, page_size: int) -> list[list[int]]:
        """The numbers that attention needs on the device, in rows."""
        return [slots_of(forward_pass, page_size)]

    @property
    def gathered(self) -> int:
        """How many sequences were read from a copy."""
        return len({index for (index, _), visible in self._visible.items() if len(visible.runs) > 1})

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """See ``PackedBatch.attend``."""
        self.windows.add(window)
        heads, rows, head_size = query.shape
        used = len(self._slots)
        self._kv_pages.write(layer, self._slots, key[:, :used], value[:, :used])
        outputs, start = [], 0
        for index, count in enumerate(self._pass.counts):
            end = start + count
            # GQA: fold a group's query heads into the rows of one SDPA call, so that each key is read once.
            grouped = query[:, start:end].reshape(1, len(key), -1, head_size)
            visible = self._visible_to(index, window, grouped)
            keys, values = self._keys_values(layer, visible)
            output = scaled_dot_product_attention(grouped, keys, values, attn_mask=visible.mask, scale=scaling)
            outputs.append(output.reshape(heads, count, head_size))
            start = end
        outputs.append(query.new_zeros(heads, rows - start, head_size))
        return torch.cat(outputs, dim=1)

    def _keys_values(self, layer: int, visible: _Visible) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, length, head_size]."""
        if len(visible.runs) > 1:
            return self._workspace.gather(layer, visible.runs, visible.length)
        start = visible.runs[0].start * self._page_size
        part = slice(start, start + visible.length)
        return self._kv_pages.keys[layer][None, :, part], self._kv_pages.values[layer][None, :, part]

    def _visible_to(self, index: int, window: int | None, grouped: Tensor) -> _Visible:
        key = index, window
        if key not in self._visible:
            start, count = self._pass.starts[index], self._pass.counts[index]
            first_page = 0 if window is None else max(0, start - window + 1) // self._page_size
            pages = self._pass.page_tables[index][first_page : -(-(start + count) // self._page_size)]
            first = first_page * self._page_size
            mask = _mask(range(start, start + count), first, window, grouped)
            self._visible[key] = _Visible(start + count - first, runs(pages), mask)
        return self._visible[key]


class Workspace:
    """A buffer in which the pages of a sequence lie in one run, one sequence and layer at a time.

    Pages that the previous sequence had too are not copied again.
    """

    def __init__(self, kv_pages: KVPages) -> None:
        self._kv_pages = kv_pages
        self._page_size = kv_pages.shape.page_size
        self._buffer: Tensor | None = None
        self._layer = -1
        self._pages: list[int] = []
        self._length = 0

    def gather(self, layer: int, page_runs: Sequence[range], length: int) -> tuple[Tensor, Tensor]:
        """Copy the first ``length`` positions of some pages; the keys and values are valid until the next call."""
        pages = [page for run in page_runs for page in run]
        buffer = self._buffer_of(len(pages))
        if layer != self._layer:
            self._layer, self._pages = layer, []
        pairs = zip(self._pages, pages, strict=False)
        present = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        present = min(present, self._length // self._page_size)  # the last page may have been copied in part
        at = present * self._page_size
        for run in runs(pages[present:]):
            start = run.start * self._page_size
            count = min(len(run) * self._page_size, length - at)
            buffer[0, :, at : at + count] = self._kv_pages.keys[layer][:, start : start + count]
            buffer[1, :, at : at + count] = self._kv_pages.values[layer][:, start : start + count]
            at += count
        self._pages, self._length = pages, length
        return buffer[:1, :, :length], buffer[1:, :, :length]

    def _buffer_of(self, pages: int) -> Tensor:
        """A buffer for at least so many pages."""
        positions = pages * self._page_size
        if self._buffer is None or self._buffer.shape[2] < positions:
            heads, _, head_size = self._kv_pages.keys[0].shape
            self._buffer = self._kv_pages.keys[0].new_empty(2, heads, positions, head_size)
            self._pages = []
        return self._buffer


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
        query: [1, heads, T, head_size], the T tokens of all sequences and then padding.
        key: [1, kv_heads, T, head_size].
        value: [1, kv_heads, T, head_size].
        attention_mask: unused; ``packed_batch`` makes the masks.
        packed_batch: the layout.
        scaling: of the scores.
        sliding_window: in positions, for layers with sliding-window attention.

    Returns:
        [1, T, heads, head_size], 0 for padding; and None for the attention weights.
    """
    output = packed_batch.attend(module.layer_idx, query[0], key[0], value[0], scaling, sliding_window)
    return output.transpose(0, 1)[None], None


def slots_of(forward_pass: ForwardPass, page_size: int) -> list[int]:
    """The position in the pool of each token of a pass."""
    return [
        pages[position // page_size] * page_size + position % page_size
        for pages, start, count in zip(forward_pass.page_tables, forward_pass.starts, forward_pass.counts, strict=True)
        for position in range(start, start + count)
    ]


def _mask(new: range, first: int, window: int | None, grouped: Tensor) -> Tensor | None:
    """The additive mask of new positions [group · n] over the positions [length] from ``first`` on, None for none.

    Args:
        new: positions of the queries.
        first: position of the first key.
        window: of sliding-window attention, in positions; None for full attention.
        grouped: the queries [1, kv_heads, group · n, head_size].
    """
    if len(new) == 1 and (window is None or new.start - window < first):
        return None
    position = torch.arange(new.start, new.stop, device=grouped.device)[:, None]
    key = torch.arange(first, new.stop, device=grouped.device)[None, :]
    masked = key > position if window is None else (key > position) | (key <= position - window)
    mask = torch.zeros(masked.shape, dtype=grouped.dtype, device=grouped.device).masked_fill_(masked, -torch.inf)
    return mask.repeat(grouped.shape[2] // len(new), 1)
