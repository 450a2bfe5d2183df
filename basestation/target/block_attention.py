"""Packed attention on a CPU whose result for a position depends on that position's own sequence alone, bit for bit.

PyTorch's kernel rounds differently for different numbers of query rows and of keys. Here a position is always
computed in calls of the same shape, whatever else runs: the query rows are a whole block of positions, which starts at
a multiple of the block's size, and the keys begin and end at multiples of ``_KEY_STEP``. Query rows that are not in the
pass are zeros, and keys that a position does not see are masked. Only the number of blocks in a call varies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from basestation.kv_cache.kv_pages import KVPages
from basestation.kv_cache.kv_pool import runs
from basestation.target.attention import Workspace, slots_of
from basestation.target.forward_pass import ForwardPass

_SIZES = (4, 2, 1)
_MOST_QUERY_ROWS = 48
"""From 64 query rows on PyTorch's kernel may rearrange the keys, which it decides by the number of blocks too."""
_KEY_STEP = 64
"""Divides the page size; block sizes divide it."""


@dataclass(frozen=True, slots=True)
class _Call:
    """Consecutive blocks of one sequence that see the same keys.

    Attributes:
        sequence: which of the pass.
        blocks: of the pass, in order.
        runs: the runs of pages that hold the keys.
        keys: which of the positions in these pages.
        mask: additive [blocks, 1, group · size, keys].
    """

    sequence: int
    blocks: slice
    runs: list[range]
    keys: slice
    mask: Tensor


class BlockBatch:
    """A ``PackedBatch`` with a few SDPA calls per sequence, all of the same shape.

    Args:
        forward_pass: that it is for.
        kv_pages: that the pass reads and writes.
        placed: its ``layout``, on the CPU.
    """

    def __init__(self, forward_pass: ForwardPass, kv_pages: KVPages, placed: Sequence[Tensor]) -> None:
        self.windows: set[int | None] = set()
        self._pass = forward_pass
        self._kv_pages = kv_pages
        self._page_size = kv_pages.shape.page_size
        (self._slots,) = placed
        self._workspace = Workspace(kv_pages)
        self._blocks: _Blocks | None = None
        self._calls: dict[int | None, list[_Call]] = {}
        self._clear_new_pages()

    @staticmethod
    def layout(forward_pass: ForwardPass, page_size: int) -> list[list[int]]:
        """See ``SequentialBatch.layout``."""
        return [slots_of(forward_pass, page_size)]

    @property
    def gathered(self) -> int:
        """How many sequences were read from a copy."""
        return len({call.sequence for call in chain.from_iterable(self._calls.values()) if len(call.runs) > 1})

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """See ``PackedBatch.attend``."""
        used = len(self._slots)
        self._kv_pages.write(layer, self._slots, key[:, :used], value[:, :used])
        if self._blocks is None:
            self._blocks = _Blocks(self._pass, len(query) // len(key))
        folded = self._blocks.fold(query[:, :used])
        outputs = []
        for call in self._calls_for(self._blocks, window, query.dtype):
            part = folded[call.blocks]
            keys, values = (one.expand(len(part), -1, -1, -1) for one in self._keys_values(layer, call))
            outputs.append(scaled_dot_product_attention(part, keys, values, attn_mask=call.mask, scale=scaling))
        return pad(self._blocks.unfold(torch.cat(outputs)), (0, 0, 0, query.shape[1] - used))

    def _keys_values(self, layer: int, call: _Call) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, length, head_size]."""
        if len(call.runs) > 1:
            keys, values = self._workspace.gather(layer, call.runs, call.keys.stop)
            return keys[:, :, call.keys], values[:, :, call.keys]
        start = call.runs[0].start * self._page_size
        part = slice(start + call.keys.start, start + call.keys.stop)
        return self._kv_pages.keys[layer][None, :, part], self._kv_pages.values[layer][None, :, part]

    def _calls_for(self, blocks: "_Blocks", window: int | None, dtype: torch.dtype) -> list[_Call]:
        if window not in self._calls:
            # the zeros at the start of a block see keys that no position of the pass does
            self.windows.add(None if window is None else window + blocks.size - 1)
            self._calls[window] = list(self._made_calls(blocks, window, dtype))
        return self._calls[window]

    def _made_calls(self, blocks: "_Blocks", window: int | None, dtype: torch.dtype) -> Iterator[_Call]:
        first = 0
        for sequence, numbers in enumerate(blocks.of_sequences):
            for keys, members in groupby(numbers, lambda number: _keys_of(number, blocks.size, window)):
                same = list(members)
                first_page = keys.start // self._page_size
                pages = self._pass.page_tables[sequence][first_page : -(-keys.stop // self._page_size)]
                skipped = first_page * self._page_size
                mask = _mask(range(same[0] * blocks.size, (same[-1] + 1) * blocks.size), keys, window, dtype)
                yield _Call(
                    sequence,
                    slice(first, first + len(same)),
                    runs(pages),
                    slice(keys.start - skipped, keys.stop - skipped),
                    mask.view(len(same), 1, blocks.size, -1).repeat(1, 1, blocks.group, 1),
                )
                first += len(same)

    def _clear_new_pages(self) -> None:
        """Zero the rest of pages whose first position is new: masked keys must be finite."""
        size = self._page_size
        for start, count, pages in zip(self._pass.starts, self._pass.counts, self._pass.page_tables, strict=True):
            last, used = divmod(start + count - 1, size)
            if last * size >= start:
                self._kv_pages.clear(range(pages[last] * size + used + 1, (pages[last] + 1) * size))


class _Blocks:
    """The blocks of positions that the tokens of a pass are in.

    Args:
        forward_pass: see above.
        group: how many query heads share a key.

    Attributes:
        group: see above.
        size: positions of a block.
        of_sequences: the numbers of the blocks of each sequence; block n begins at position n · size.
    """

    def __init__(self, forward_pass: ForwardPass, group: int) -> None:
        self.group = group
        self.size = size = next((one for one in _SIZES if one * group <= _MOST_QUERY_ROWS), 1)
        self.of_sequences: list[range] = []
        tokens: list[int] = []  # the token of each place in a block; the one after the last is a row of zeros
        places: list[int] = []
        total = sum(forward_pass.counts)
        for start, count in zip(forward_pass.starts, forward_pass.counts, strict=True):
            numbers = range(start // size, -(-(start + count) // size))
            before, first = start - numbers.start * size, len(places)
            places.extend(range(len(tokens) + before, len(tokens) + before + count))
            after = len(numbers) * size - before - count
            tokens += [*[total] * before, *range(first, first + count), *[total] * after]
            self.of_sequences.append(numbers)
        self._tokens, self._places = torch.tensor(tokens), torch.tensor(places)

    def fold(self, query: Tensor) -> Tensor:
        """The queries [heads, T, head_size] as [blocks, kv_heads, group · size, head_size]."""
        heads, _, head_size = query.shape
        blocks = pad(query, (0, 0, 0, 1)).index_select(1, self._tokens)
        grouped = blocks.view(heads // self.group, self.group, -1, self.size, head_size)
        return grouped.permute(2, 0, 1, 3, 4).reshape(-1, heads // self.group, self.group * self.size, head_size)

    def unfold(self, output: Tensor) -> Tensor:
        """The opposite."""
        count, kv_heads, _, head_size = output.shape
        grouped = output.view(count, kv_heads, self.group, self.size, head_size).permute(1, 2, 0, 3, 4)
        return grouped.reshape(kv_heads * self.group, -1, head_size).index_select(1, self._places)


def _keys_of(block: int, size: int, window: int | None) -> range:
    """The positions that the positions of a block see, from and up to multiples of ``_KEY_STEP``."""
    first = 0 if window is None else max(0, block * size - window + 1)
    return range(first // _KEY_STEP * _KEY_STEP, -(-(block + 1) * size // _KEY_STEP) * _KEY_STEP)


def _mask(queries: range, keys: range, window: int | None, dtype: torch.dtype) -> Tensor:
    """The additive mask [queries, keys] of positions."""
    position = torch.arange(queries.start, queries.stop)[:, None]
    key = torch.arange(keys.start, keys.stop)[None]
    masked = key > position if window is None else (key > position) | (key <= position - window)
    return torch.zeros(masked.shape, dtype=dtype).masked_fill_(masked, -torch.inf)
