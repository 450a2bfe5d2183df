"""A PyTorch trace of some forward passes, for chrome://tracing or Perfetto."""

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from protocol.errors import SettingsError

_WARM_UP_PASSES = 5
_PASSES = 20


class PassProfiler:
    """Traces ``_PASSES`` passes after ``_WARM_UP_PASSES``, and writes the file after the last one or on ``close``.

    Args:
        path: of the trace file.

    Raises:
        SettingsError: it cannot be written there.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir() or not path.parent.is_dir():
            raise SettingsError("profile", str(path), "a file in a folder that exists")
        self._path = path
        self._passes = 0
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile: profile | None = profile(activities=activities)
        self._running = False

    def step(self) -> None:
        """Call before each pass."""
        self._passes += 1
        if self._passes == _WARM_UP_PASSES + 1 and self._profile:
            self._profile.start()
            self._running = True
        elif self._passes > _WARM_UP_PASSES + _PASSES:
            self.close()

    def close(self) -> None:
        """Write the trace, if there is one."""
        if self._profile and self._running:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._path))
        self._profile = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
