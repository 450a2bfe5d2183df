"""One core for the device and another for the base station, to emulate two machines."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from protocol.errors import SettingsError


@dataclass(frozen=True)
class Cores:
    """The indices of the two cores."""

    device: int
    station: int

    @classmethod
    def choose(cls) -> Self:
        """The first two cores that this process may use.

        Raises:
            SettingsError: there is only one.
        """
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) < 2:
            raise SettingsError("cores", len(allowed), "2 or more, one for the device and one for the base station")
        return cls(allowed[0], allowed[1])


@contextmanager
def running_on(core: int) -> Iterator[None]:
    """Pin this thread, and threads it starts, to one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
