"""Attention of all sequences of a pass in one call a layer: FlashAttention over page tables, on CUDA.

The kernel gives a sequence the same bits in every batch, because it splits no sequence.
"""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn.attention import varlen

from basestation.kv_cache.kv_pages import KVPages, KVShape
from basestation.target.attention import SequentialBatch, slots_of
from basestation.target.block_attention import BlockBatch
from basestation.target.forward_pass import ForwardPass
from basestation.target.host_transfer import to_device
from common.error_text import first_line

logger = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16)
_MIN_CAPABILITY = (8, 0)
_MAX_HEAD_SIZE = 256
_HEAD_SIZE_STEP = 8
_TOLERANCE = 0.05
_NEEDED = {"block_table", "seqused_k", "window_size", "enable_gqa", "num_splits"}


class VarlenBatch:
    """A ``PackedBatch`` with one call of ``torch.nn.attention.varlen.varlen_attn`` a layer.

    Args:
        forward_pass: that it is for.
        kv_pages: that the pass reads and writes.
        placed: its ``layout``, on the device of the pages.
    """

    gathered = 0
    """The kernel reads pages where they are."""

    def __init__(self, forward_pass: ForwardPass, kv_pages: KVPages, placed: Sequence[Tensor]) -> None:
        self.windows: set[int | None] = set()
        self._kv_pages = kv_pages
        self._longest, self._most_new = max(lengths_of(forward_pass)), max(forward_pass.counts)
        self._slots, numbers = placed
        sequences = len(forward_pass.counts)
        bounds = [sequences + 1, sequences + 1, sequences]
        parts = torch.split(numbers.int(), [*bounds, len(numbers) - sum(bounds)])
        self._query_ends, self._key_ends, self._used, table = parts
        self._page_table = table.view(sequences, -1)

    @staticmethod
    def layout(forward_pass: ForwardPass, page_size: int) -> list[list[int]]:
        """The slots of the new tokens; and the bounds of all sequences, their lengths and their page table."""
        lengths = lengths_of(forward_pass)
        columns = -(-max(lengths) // page_size)
        table = [[*pages[:columns], *[0] * (columns - len(pages))] for pages in forward_pass.page_tables]
        bounds = [0, *accumulate(forward_pass.counts), 0, *accumulate(lengths)]
        return [slots_of(forward_pass, page_size), [*bounds, *lengths, *chain.from_iterable(table)]]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """See ``PackedBatch.attend``."""
        self.windows.add(window)
        used = len(self._slots)
        self._kv_pages.write(layer, self._slots, key[:, :used], value[:, :used])
        keys, values = self._kv_pages.tables(layer)
        output = query.new_zeros(query.shape[1], query.shape[0], query.shape[2])
        attended = varlen.varlen_attn(
            query[:, :used].transpose(0, 1),
            keys,
            values,
            self._query_ends,
            self._key_ends,
            self._most_new,
            self._longest,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
            seqused_k=self._used,
            block_table=self._page_table,
            num_splits=1,
        )
        assert isinstance(attended, Tensor)  # no log-sum-exps were asked for
        output[:used] = attended
        return output.transpose(0, 1)


def batch_type(shape: KVShape, independent_rows: bool) -> type[SequentialBatch | BlockBatch | VarlenBatch]:
    """The attention for keys and values of this shape; on CUDA, a log line says why it is one call per sequence.

    Args:
        shape: see above.
        independent_rows: on a CPU, whether a row's result must not depend on the rows beside it in any bit.
    """
    if shape.torch_device.type != "cuda":
        return BlockBatch if independent_rows else SequentialBatch
    if missing := missing_for_varlen(shape):
        logger.warning("attention: one call per sequence and layer, because %s", missing)
        return SequentialBatch
    logger.info("attention: one call per layer for all sequences, over pages of %d positions", shape.page_size)
    return VarlenBatch


def missing_for_varlen(shape: KVShape) -> str | None:
    """What ``VarlenBatch`` lacks on a CUDA device, None for nothing."""
    lacking = _NEEDED - inspect.signature(varlen.varlen_attn).parameters.keys()
    if lacking:
        return f"varlen_attn of PyTorch {torch.__version__} has no {', '.join(sorted(lacking))}"
    if shape.dtype not in _DTYPES:
        return f"the KV cache is of {shape.dtype}; FlashAttention has float16 and bfloat16"
    if shape.head_size > _MAX_HEAD_SIZE or shape.head_size % _HEAD_SIZE_STEP:
        return f"heads have {shape.head_size} numbers; FlashAttention has multiples of 8 up to {_MAX_HEAD_SIZE}"
    capability = torch.cuda.get_device_capability(shape.torch_device)
    if capability < _MIN_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; FlashAttention needs 8.0"
    return failure_of_trial(shape)


@torch.inference_mode()
def failure_of_trial(shape: KVShape) -> str | None:
    """Why a small pass of ``VarlenBatch`` fails, or how far it is from ``SequentialBatch``; None if it does neither.

    One sequence has cached positions on scattered pages, the other starts; with and without sliding windows.
    """
    page_size = shape.page_size
    forward_pass = ForwardPass(starts=[page_size + 9, 0], counts=[5, 1], page_tables=[[2, 0], [1]])
    kv_pages = KVPages(replace(shape, layers=1), 3)
    for cached in (*kv_pages.keys, *kv_pages.values):
        cached.normal_()
    query, key, value = (
        torch.randn(heads, 6, shape.head_size, dtype=shape.dtype, device=shape.torch_device)
        for heads in (2 * shape.kv_heads, shape.kv_heads, shape.kv_heads)
    )
    for window in (None, 7, page_size):
        outputs = []
        for kind in (SequentialBatch, VarlenBatch):
            batch = kind(forward_pass, kv_pages, to_device(kind.layout(forward_pass, page_size), shape.torch_device))
            try:
                outputs.append(batch.attend(0, query, key, value, shape.head_size**-0.5, window))
            except (RuntimeError, ValueError) as error:
                return f"a trial failed: {first_line(error)}"
        difference = float((outputs[0] - outputs[1]).abs().max())
        if not difference < _TOLERANCE:  # NaN compares false
            return f"its result in a trial with window {window} differed by {difference:.2g}"
    return None


def lengths_of(forward_pass: ForwardPass) -> list[int]:
    """The positions of each sequence after the pass."""
    return [start + count for start, count in zip(forward_pass.starts, forward_pass.counts, strict=True)]
