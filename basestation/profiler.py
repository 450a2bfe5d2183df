"""A PyTorch trace of some passes, for chrome://tracing or Perfetto."""

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

_WARM_UP_PASSES = 5
_PASSES = 20


class PassProfiler:
    """Traces ``_PASSES`` passes after the first few, and writes the file when it has them or is closed.

    Args:
        path: of the trace.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._passes = 0
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile: profile | None = profile(activities=activities)
        self._running = False

    def step(self) -> None:
        """A pass is about to begin."""
        self._passes += 1
        if self._passes == _WARM_UP_PASSES + 1 and self._profile:
            self._profile.start()
            self._running = True
        elif self._passes > _WARM_UP_PASSES + _PASSES:
            self.close()

    def close(self) -> None:
        """Write what was traced."""
        if self._profile and self._running:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._path))
        self._profile = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
