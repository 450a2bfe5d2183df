"""The times of a pass: on CUDA by events, since a clock would measure how long it takes to enqueue kernels."""

from collections.abc import Iterator

import pytest
import torch

from basestation.engine.pass_clock import PassClock


class FakeEvent:
    """An event that the device reaches at the next of some times, in milliseconds."""

    times: Iterator[float]
    waited = False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:1"
        self.time = next(FakeEvent.times)

    def synchronize(self) -> None:
        FakeEvent.waited = True

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert FakeEvent.waited
        return end.time - self.time


def test_on_cuda_the_parts_are_timed_by_events_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", "stream of {}".format)
    FakeEvent.times = iter((10.0, 40.0, 45.0))
    clock = PassClock(torch.device("cuda:1"), lambda: 0.0)
    for _ in range(3):
        clock.mark()
    assert clock.seconds() == pytest.approx([0.030, 0.005])


def test_on_a_cpu_they_are_timed_by_the_clock() -> None:
    times = iter((1.0, 1.5, 3.0))
    clock = PassClock(torch.device("cpu"), lambda: next(times))
    for _ in range(3):
        clock.mark()
    assert clock.seconds() == [0.5, 1.5]
