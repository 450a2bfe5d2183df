"""The limit of decoding: each token reads the weights once, at the machine's memory bandwidth."""

from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from time import perf_counter

import numpy as np
import onnx
from onnx import TensorProto, helper

_BYTES = 2**28
_ROW_READERS = frozenset({"Gather", "GatherBlockQuantized", "GroupQueryAttention"})
"""Operators that read a few rows of a weight: the embedding, and the tables of the rotary embedding."""


class MemoryReader:
    """Measures the read bandwidth, as the time in which threads find the largest number of an array."""

    def __init__(self) -> None:
        self._array = np.ones(_BYTES // 4, np.float32)

    def bandwidth(self, threads: int) -> float:
        """Bytes per second that ``threads`` threads read together."""
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(np.max, [np.ones(1)] * threads))  # starts the threads
            began = perf_counter()
            list(pool.map(np.max, np.array_split(self._array, threads)))
            return self._array.nbytes / (perf_counter() - began)


def weight_bytes(graph_path: Path) -> int:
    """Bytes of weights that decoding one token reads."""
    graph = onnx.load(graph_path, load_external_data=False).graph
    read_whole = {name for node in graph.node if node.op_type not in _ROW_READERS for name in node.input}
    return sum(_size(weight) for weight in graph.initializer if weight.name in read_whole)


def _size(weight: TensorProto) -> int:
    return int(helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize * prod(weight.dims))
