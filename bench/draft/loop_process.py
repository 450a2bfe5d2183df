"""A loop in a process of its own, so that no case uses the threads, the caches or the memory of another."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from bench.draft.loops import LOOPS, Decoded, Loop
from bench.draft.models import Models
from device.process_memory import peak_memory_bytes
from export.quiet import quiet_tools

_loops: list[Loop] = []
"""The loop of this process."""


class LoopProcess:
    """A process that has loaded the model of a case."""

    def __init__(self, case: str, models: Models, threads: int) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _load, (case, models, threads))

    def decode(self, prompt_ids: list[int], count: int) -> Decoded:
        """See ``Loop``."""
        return self._pool.submit(_decode, prompt_ids, count).result()

    def close(self) -> int:
        """End the process; its peak resident memory in bytes."""
        peak = self._pool.submit(_unload).result()
        self._pool.shutdown()
        return peak


def _load(case: str, models: Models, threads: int) -> None:
    with quiet_tools():
        _loops.append(LOOPS[case][1](models, threads))


def _decode(prompt_ids: list[int], count: int) -> Decoded:
    return _loops[0].decode(prompt_ids, count)


def _unload() -> int:
    _loops.clear()  # onnxruntime-genai reports models that are left when the interpreter ends
    return peak_memory_bytes()
