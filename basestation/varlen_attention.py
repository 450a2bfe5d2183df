"""Attention of all sequences of a pass in one call a layer: FlashAttention over page tables, on CUDA.

The kernel gives a sequence the same bits in every batch, because it splits no sequence.
"""

import inspect
import logging
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import varlen

from basestation.attention import SequentialBatch, slots_of
from basestation.forward_pass import ForwardPass
from basestation.kv_pages import KVPages, KVShape

logger = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16)
_MIN_CAPABILITY = (8, 0)
_MAX_HEAD_SIZE = 256
_HEAD_SIZE_STEP = 8
_TOLERANCE = 0.05
_NEEDED = {"block_table", "seqused_k", "window_size", "enable_gqa", "num_splits"}


class VarlenBatch:
    """A ``PackedBatch`` with one call of ``torch.nn.attention.varlen.varlen_attn`` a layer."""

    gathered = 0
    """The kernel reads pages where they are."""

    def __init__(self, forward_pass: ForwardPass, kv_pages: KVPages) -> None:
        self.windows: set[int | None] = set()
        self._kv_pages = kv_pages
        page_size, torch_device = kv_pages.shape.page_size, kv_pages.shape.torch_device
        lengths = [start + count for start, count in zip(forward_pass.starts, forward_pass.counts, strict=True)]
        self._longest = max(lengths)
        self._most_new = max(forward_pass.counts)
        columns = -(-self._longest // page_size)
        table = [[*pages[:columns], *[0] * (columns - len(pages))] for pages in forward_pass.page_tables]
        self._slots = torch.tensor(slots_of(forward_pass, page_size), device=torch_device)
        self._page_table = torch.tensor(table, dtype=torch.int32, device=torch_device)
        bounds = [[0, *accumulate(forward_pass.counts)], [0, *accumulate(lengths)], [0, *lengths]]
        self._bounds = torch.tensor(bounds, dtype=torch.int32, device=torch_device)

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
            self._bounds[0],
            self._bounds[1],
            self._most_new,
            self._longest,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
            seqused_k=self._bounds[2, 1:],
            block_table=self._page_table,
            num_splits=1,
        )
        assert isinstance(attended, Tensor)  # no log-sum-exps were asked for
        output[:used] = attended
        return output.transpose(0, 1)


def batch_type(shape: KVShape) -> type[SequentialBatch] | type[VarlenBatch]:
    """The attention for keys and values of this shape; on CUDA, a log line says why it is one call per sequence."""
    if shape.torch_device.type != "cuda":
        return SequentialBatch
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
    """Why a small pass of ``VarlenBatch`` fails, or how far it is from ``SequentialBatch``; None if it does neither."""
    forward_pass = ForwardPass(starts=[0, 0], counts=[5, 1], page_tables=[[1], [0]])
    kv_shape, heads = replace(shape, layers=1), (2 * shape.kv_heads, shape.kv_heads, shape.kv_heads)
    query, key, value = (
        torch.randn(count, 6, shape.head_size, dtype=shape.dtype, device=shape.torch_device) for count in heads
    )
    outputs = []
    for kind in (SequentialBatch, VarlenBatch):
        batch = kind(forward_pass, KVPages(kv_shape, 2))
        try:
            outputs.append(batch.attend(0, query, key, value, shape.head_size**-0.5, None))
        except (RuntimeError, ValueError) as error:
            return f"a trial failed: {str(error).splitlines()[0]}"
    difference = float((outputs[0] - outputs[1]).abs().max())
    return None if difference < _TOLERANCE else f"its result in a trial differed by {difference:.2g}"
