"""Forward passes as CUDA graphs: all kernels of a pass are enqueued at once, instead of one by one from Python.

There is a graph for each number of rows that passes are padded to. Each is tried at the start, and kept if it
computes what a pass without it computes, in less time.

Knows passes; not sequences.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor

from basestation.engine.pass_clock import PassClock
from basestation.kv_cache.kv_pages import KVPages
from basestation.target.forward_pass import ForwardPass
from basestation.target.padded_pass import PaddedPass
from basestation.target.varlen_attention import VarlenBatch, lengths_of
from common.error_text import first_line

RunModel: TypeAlias = Callable[[Tensor, Tensor, Tensor, VarlenBatch], Tensor]
"""Token ids, positions and rows wanted, each [rows], and the layout → their logits [rows, V]."""
Capture: TypeAlias = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]
"""Kernels to enqueue → what they compute, and a function that computes it again."""

logger = logging.getLogger(__name__)

BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512)
"""Rows that passes are padded to; larger passes take about as long to run as to enqueue."""
_TOLERANCE = 8
"""How far logits may differ, in units of the data type's precision at the largest one."""
_REPEATS = 7
_CACHED = 32
"""Positions that each sequence of a trial has before it."""


class PassGraphs:
    """A graph for some numbers of rows.

    Args:
        run_model: the kernels of a pass.
        kv_pages: that passes read and write; the last page is the spare one.
        context_length: of a sequence, at most.
        capture: how kernels become a graph.
    """

    def __init__(self, run_model: RunModel, kv_pages: KVPages, context_length: int, capture: Capture) -> None:
        self._run_model, self._kv_pages, self._capture = run_model, kv_pages, capture
        self._columns = -(-context_length // kv_pages.shape.page_size)
        self._graphs: dict[int, _Graph] = {}

    def run(self, forward_pass: ForwardPass) -> Tensor | None:
        """The logits [rows, V] of a pass, valid until the next; None if there is no graph for it."""
        bucket = bisect_left(BUCKETS, len(forward_pass.token_ids))
        graph = self._graphs.get(BUCKETS[bucket]) if bucket < len(BUCKETS) else None
        if graph is None or max(lengths_of(forward_pass)) > self._columns * self._kv_pages.shape.page_size:
            return None
        return graph.run(forward_pass)

    def try_all(self, eager: Callable[[ForwardPass], Tensor]) -> bool:
        """Keep the graphs that are faster than ``eager`` passes with the same logits; a log line says which.

        Returns:
            Whether there are any; none is kept after a failure or with other logits.
        """
        # Each page of a trial holds new rows after at least one cached position; the last page is the spare one.
        most = (self._kv_pages.count - 1) * (self._kv_pages.shape.page_size - 1)
        buckets = [rows for rows in BUCKETS if rows <= most]
        try:
            gains = {rows: self._gain(rows, eager) for rows in reversed(buckets)}  # smaller ones reuse memory
        except Exception as error:  # noqa: BLE001 - whatever a capture meets, passes without it work
            self._graphs.clear()
            logger.warning("no CUDA graphs: %s", first_line(error))
            return False
        slower = sorted(rows for rows, gain in gains.items() if gain <= 1)
        for rows in slower:
            del self._graphs[rows]
        if not self._graphs:
            logger.info("no CUDA graphs: passes are not faster with them")
            return False
        faster = [gain for gain in gains.values() if gain > 1]
        text = "CUDA graphs: passes padded to %s rows are %.2f to %.2f times as fast%s"
        others = f"; not for {', '.join(map(str, slower))} rows, which are slower" if slower else ""
        logger.info(text, ", ".join(map(str, sorted(self._graphs))), min(faster), max(faster), others)
        return True

    def _gain(self, rows: int, eager: Callable[[ForwardPass], Tensor]) -> float:
        """Make the graph for ``rows``, and tell how many times as fast as ``eager`` it is.

        Raises:
            _OtherLogits: it computes something else.
        """
        before, forward_pass = trial_passes(rows, self._kv_pages)
        eager(before)
        expected = eager(forward_pass)
        graph = self._graphs[rows] = _Graph(
            PaddedPass(rows, self._columns, self._kv_pages.shape, self._kv_pages.count - 1),
            lambda padded: self._run_model(
                padded.token_ids,
                padded.positions,
                padded.logit_rows,
                VarlenBatch(padded.bounds, self._kv_pages, padded.layout),
            ),
            self._capture,
            forward_pass,
        )
        allowed = _TOLERANCE * torch.finfo(expected.dtype).eps * float(expected.abs().max())
        difference = float((graph.run(forward_pass) - expected).abs().max())
        if not difference <= allowed:  # NaN compares false
            raise _OtherLogits(f"logits of {rows} rows differ by {difference:.2g} from those without")
        seconds: tuple[list[float], list[float]] = [], []
        for _ in range(_REPEATS):
            for run, times in zip((eager, graph.run), seconds, strict=True):
                times.append(_seconds(lambda: run(forward_pass), self._kv_pages.shape.torch_device))  # noqa: B023
        without, with_graph = map(median, seconds)
        return without / with_graph


class _OtherLogits(Exception):  # noqa: N818 - an answer, not a fault
    """A graph computes other logits than the pass without it."""


class _Graph:
    """A pass of one number of rows, captured.

    Args:
        padded: its numbers.
        run_model: its kernels.
        capture: makes the graph.
        forward_pass: any that fits; what the kernels run on while they are captured.
    """

    def __init__(
        self,
        padded: PaddedPass,
        run_model: Callable[[PaddedPass], Tensor],
        capture: Capture,
        forward_pass: ForwardPass,
    ) -> None:
        self._padded = padded
        padded.fill(forward_pass)
        self._logits, self._replay = capture(lambda: run_model(padded))

    def run(self, forward_pass: ForwardPass) -> Tensor:
        """See ``PassGraphs.run``."""
        self._padded.fill(forward_pass)
        self._replay()
        return self._logits[: len(forward_pass.logit_rows)]


@dataclass
class CudaCapture:
    """Captures kernels on a CUDA device, all in one memory pool: graphs run one after another."""

    torch_device: torch.device
    _pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """See ``Capture``."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.torch_device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # what libraries allocate at their first call is not part of a graph
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self._pool):
                logits = run()
        self._pool = graph.pool()
        return logits, lambda: self._replay(graph)

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        with torch.cuda.device(self.torch_device):
            graph.replay()


def trial_passes(rows: int, kv_pages: KVPages) -> tuple[ForwardPass, ForwardPass]:
    """A pass of one row less than ``rows``, and the pass that writes the positions before it, in pages of their own."""
    page_size, new = kv_pages.shape.page_size, rows - 1
    sequences = min(-(-new // 6), kv_pages.count - 1)
    counts = [new // sequences + (index < new % sequences) for index in range(sequences)]
    cached = min(_CACHED, page_size - max(counts))
    tables: list[Sequence[int]] = [[sequences - 1 - index] for index in range(sequences)]
    before = ForwardPass(
        [index % 7 for index in range(sequences * cached)],
        [*range(cached)] * sequences,
        [0],
        [0] * sequences,
        [cached] * sequences,
        tables,
    )
    positions = [cached + index for count in counts for index in range(count)]
    token_ids = [index % 5 for index in range(new)]
    return before, ForwardPass(token_ids, positions, [*range(new)], [cached] * sequences, counts, tables)


def _seconds(run: Callable[[], object], torch_device: torch.device) -> float:
    clock = PassClock(torch_device, time.perf_counter)
    clock.mark()
    run()
    clock.mark()
    return clock.seconds()[0]
