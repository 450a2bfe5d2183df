"""Runs forward passes of a transformers model over the pages of the KV pool.

Another engine, or a group of processes, can stand in its place: a pass is plain
numbers, and nothing here remembers a sequence.
"""

from typing import Any

import torch
from torch import Tensor

from basestation.kv_cache.kv_pages import KVPages
from basestation.target.forward_pass import ForwardPass
from basestation.target.host_transfer import to_device
from basestation.target.varlen_attention import batch_type

_MAX_UNPADDED_ROWS = 32
"""Row counts above it are padded on a CPU: by up to 7 rows, above 256 by up to a sixteenth."""


class ModelRunner:
    """A model and its KV pages.

    Args:
        model: a transformers model with packed attention, on its PyTorch device.
        vocab_size: logits of a row.
        kv_pages: that passes read and write.
        independent_rows: see ``batch_type``.

    Attributes:
        gathered: sequences so far whose pages a pass had to copy into one run.
        window: how many positions a pass reads for a token, itself included; None before the first pass, or for all.
    """

    def __init__(self, model: Any, vocab_size: int, kv_pages: KVPages, independent_rows: bool = False) -> None:
        self.gathered = 0
        self.window: int | None = None
        self._model = model
        self._vocab_size = vocab_size
        self._kv_pages = kv_pages
        self._torch_device = kv_pages.shape.torch_device
        self._batch_type = batch_type(kv_pages.shape, independent_rows)

    @torch.inference_mode()
    def run(self, forward_pass: ForwardPass) -> Tensor:
        """Write the keys and values of the new tokens to their pages.

        Returns:
            The logits [rows, V], float32, of ``forward_pass.logit_rows``.
        """
        rows = [forward_pass.token_ids, forward_pass.positions, forward_pass.logit_rows or [0]]
        if self._torch_device.type == "cpu":
            rows = [_padded(row) for row in rows]
        layout = self._batch_type.layout(forward_pass, self._kv_pages.shape.page_size)
        ids, positions, kept, *placed = to_device([*rows, *layout], self._torch_device)
        packed_batch = self._batch_type(forward_pass, self._kv_pages, placed)
        output = self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=kept,
            packed_batch=packed_batch,
        )
        self.gathered += packed_batch.gathered
        windows = [window for window in packed_batch.windows if window is not None]
        self.window = max(windows) if len(windows) == len(packed_batch.windows) else None
        logits: Tensor = output.logits[0, : len(forward_pass.logit_rows), : self._vocab_size].float()
        return logits


def _padded(row: list[int]) -> list[int]:
    """Pad with zeros to one of a few lengths.

    Row counts are padded to a few buckets, so that oneDNN's primitive cache stays bounded.
    Creating the primitives for a new row count takes a tenth of a forward pass.
    """
    step = max(8, 2 ** (len(row).bit_length() - 5)) if len(row) > _MAX_UNPADDED_ROWS else 1
    return row + [0] * (-len(row) % step)
