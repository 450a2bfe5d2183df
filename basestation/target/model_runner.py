"""Runs forward passes of a transformers model over the pages of the KV pool.

Another engine, or a group of processes, can stand in its place: a pass is plain
numbers, and nothing here remembers a sequence.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from basestation.kv_cache.kv_pages import KVPages
from basestation.target.attention import PackedBatch
from basestation.target.forward_pass import ForwardPass
from basestation.target.host_transfer import to_device
from basestation.target.pass_graphs import Capture, CudaCapture, PassGraphs
from basestation.target.varlen_attention import VarlenBatch, batch_type

logger = logging.getLogger(__name__)

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
        self._graphs: PassGraphs | None = None

    def use_graphs(self, context_length: int, capture: Capture | None = None) -> bool:
        """Capture passes as CUDA graphs where that is faster.

        Args:
            context_length: of a sequence, at most.
            capture: how; by default on the device of the pages.

        Returns:
            Whether there are graphs; then the last page is theirs.
        """
        if self._batch_type is not VarlenBatch or self._kv_pages.count < 2:
            if self._torch_device.type == "cuda":
                logger.info("no CUDA graphs: they need one attention call per layer, and a page more than a session")
            return False
        capture = capture or CudaCapture(self._torch_device)
        with torch.inference_mode():
            graphs = PassGraphs(self._logits, self._kv_pages, context_length, capture)
            self._graphs = graphs if graphs.try_all(self._run_eager) else None
        return self._graphs is not None

    @torch.inference_mode()
    def run(self, forward_pass: ForwardPass) -> Tensor:
        """Write the keys and values of the new tokens to their pages.

        Returns:
            The logits [rows, V], float32, of ``forward_pass.logit_rows``.
        """
        captured = self._graphs.run(forward_pass) if self._graphs is not None else None
        logits = self._run_eager(forward_pass) if captured is None else captured
        return logits[:, : self._vocab_size].float()

    def _run_eager(self, forward_pass: ForwardPass) -> Tensor:
        """As ``run``, with all that the model returns of a row."""
        rows = [forward_pass.token_ids, forward_pass.positions, forward_pass.logit_rows or [0]]
        if self._torch_device.type == "cpu":
            rows = [_padded(row) for row in rows]
        layout = self._batch_type.layout(forward_pass, self._kv_pages.shape.page_size)
        ids, positions, kept, *placed = to_device([*rows, *layout], self._torch_device)
        packed_batch = self._batch_type(forward_pass, self._kv_pages, placed)
        logits = self._logits(ids, positions, kept, packed_batch)
        self.gathered += packed_batch.gathered
        windows = [window for window in packed_batch.windows if window is not None]
        self.window = max(windows) if len(windows) == len(packed_batch.windows) else None
        return logits[: len(forward_pass.logit_rows)]

    def _logits(self, ids: Tensor, positions: Tensor, kept: Tensor, packed_batch: PackedBatch) -> Tensor:
        output = self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=kept,
            packed_batch=packed_batch,
        )
        logits: Tensor = output.logits[0]
        return logits


def _padded(row: list[int]) -> list[int]:
    """Pad with zeros to one of a few lengths.

    Row counts are padded to a few buckets, so that oneDNN's primitive cache stays bounded.
    Creating the primitives for a new row count takes a tenth of a forward pass.
    """
    step = max(8, 2 ** (len(row).bit_length() - 5)) if len(row) > _MAX_UNPADDED_ROWS else 1
    return row + [0] * (-len(row) % step)
