"""The times of the parts of a forward pass: by the clock on a CPU, by events on CUDA, whose kernels run later.

Knows marks in a queue of kernels; not what runs between them.
"""

from collections.abc import Callable
from itertools import pairwise

import torch


class PassClock:
    """Marks on the time line of a device.

    Args:
        torch_device: that runs the pass.
        clock: seconds, monotonic.
    """

    def __init__(self, torch_device: torch.device, clock: Callable[[], float]) -> None:
        self._torch_device, self._on_cuda = torch_device, torch_device.type == "cuda"
        self._clock = clock
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Mark the end of what was enqueued up to now."""
        self._times.append(self._clock())
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._torch_device))
            self._events.append(event)

    def seconds(self) -> list[float]:
        """The time from each mark to the next; waits for the last one."""
        if not self._on_cuda:
            return [end - start for start, end in pairwise(self._times)]
        self._events[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(self._events)]
