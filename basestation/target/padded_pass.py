"""A forward pass whose numbers lie in one buffer of fixed size on the device, so that its kernels can be run again.

Rows beyond those of a pass are one more sequence, in a page that no other uses.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from basestation.kv_cache.kv_pages import KVShape
from basestation.target.attention import slots_of
from basestation.target.forward_pass import ForwardPass
from basestation.target.varlen_attention import lengths_of


class PaddedPass:
    """The numbers of a pass of at most ``rows`` tokens.

    Args:
        rows: that passes are padded to, by at most a page.
        columns: pages of the longest sequence.
        shape: of the KV cache.
        spare_page: for the rows beyond those of a pass.

    Attributes:
        token_ids: of each row, int64 [rows].
        positions: of each row, int64 [rows].
        logit_rows: those whose logits count, and then any, int64 [rows].
        layout: what ``VarlenBatch`` takes for ``bounds``.
        bounds: a pass with the most sequences, the most new tokens in one of them and the most positions.
    """

    def __init__(self, rows: int, columns: int, shape: KVShape, spare_page: int) -> None:
        sequences = rows + 1  # of one row each, and the one in the spare page
        self._rows, self._columns, self._spare_page = rows, columns, spare_page
        self._page_size, self._on_cuda = shape.page_size, shape.torch_device.type == "cuda"
        self._sizes = [rows, rows, rows, rows, sequences + 1, sequences + 1, sequences]
        size = sum(self._sizes) + sequences * columns
        self._buffer = torch.zeros(size, dtype=torch.int64, device=shape.torch_device)
        parts: Sequence[Tensor] = torch.split(self._buffer, [rows, rows, rows, rows, size - 4 * rows])
        self.token_ids, self.positions, self.logit_rows, *self.layout = parts
        longest, others = columns * self._page_size, [0] * rows
        self.bounds = ForwardPass(starts=[longest - rows, *others], counts=[rows, *others])

    def fill(self, forward_pass: ForwardPass) -> None:
        """Copy the numbers of a pass to the device, in one copy that nothing waits for.

        The sequences that a pass does not have are without rows and positions; their page tables are not read.
        """
        padded = self._with_spare_rows(forward_pass)
        lengths = lengths_of(padded)
        query_ends, key_ends = list(accumulate(padded.counts)), list(accumulate(lengths))
        parts = [padded.token_ids, padded.positions, padded.logit_rows, slots_of(padded, self._page_size)]
        parts += [[0, *query_ends], [0, *key_ends], lengths]
        beyond = [0, 0, 0, 0, query_ends[-1], key_ends[-1], 0]
        size, start = sum(self._sizes) + len(lengths) * self._columns, 0
        staging = torch.zeros(size, dtype=torch.int64, device="cpu", pin_memory=self._on_cuda)
        numbers = staging.numpy()
        for part, number, width in zip(parts, beyond, self._sizes, strict=True):
            numbers[start : start + len(part)] = part
            numbers[start + len(part) : start + width] = number
            start += width
        for row, pages in zip(numbers[start:].reshape(-1, self._columns), padded.page_tables, strict=True):
            row[: len(pages)] = pages[: self._columns]
        self._buffer[:size].copy_(staging, non_blocking=self._on_cuda)

    def _with_spare_rows(self, forward_pass: ForwardPass) -> ForwardPass:
        """A pass with one more sequence, of the rows that it lacks."""
        lacking = self._rows - len(forward_pass.token_ids)
        assert 0 <= lacking <= self._page_size
        return ForwardPass(
            [*forward_pass.token_ids, *[0] * lacking],
            [*forward_pass.positions, *range(lacking)],
            forward_pass.logit_rows,
            [*forward_pass.starts, 0],
            [*forward_pass.counts, lacking],
            [*forward_pass.page_tables, [self._spare_page]],
        )
