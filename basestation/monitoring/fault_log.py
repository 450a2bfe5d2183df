"""The latest faults of each device: of those that the base station sent, and of those that devices reported."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_PER_DEVICE = 10
_MAX_CODE = 40
_MAX_TEXT = 300


@dataclass(frozen=True, slots=True)
class LoggedFault:
    """A fault; ``time`` in seconds since 1970, ``reported`` if the device sent it and the text is the device's."""

    time: float
    device: str
    code: str
    text: str
    reported: bool


class FaultLog:
    """The last faults of each device, so that one device's do not push out another's.

    Written by the engine's thread, read by any.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._by_device: dict[str, deque[LoggedFault]] = {}
        self._elsewhere: dict[str, Sequence[LoggedFault]] = {}

    def add(self, device: str, code: str, text: str, reported: bool = False) -> None:
        """Keep a fault; code and text are cut to a length for display."""
        fault = LoggedFault(self._clock(), device, code[:_MAX_CODE], text[:_MAX_TEXT], reported)
        self._by_device.setdefault(device, deque(maxlen=_PER_DEVICE)).append(fault)

    def take(self, replica: str, faults: Sequence[LoggedFault]) -> None:
        """Keep the latest faults of a replica, in place of those it reported before."""
        self._elsewhere[replica] = faults

    def drop(self, device: str) -> None:
        """Forget a device's faults."""
        self._by_device.pop(device, None)

    def newest(self, count: int) -> list[LoggedFault]:
        """At most ``count`` faults of all devices, the newest first."""
        logs: list[Iterable[LoggedFault]] = [log.copy() for log in self._by_device.copy().values()]
        logs += self._elsewhere.copy().values()
        return sorted((fault for log in logs for fault in log), key=lambda fault: -fault.time)[:count]
