"""Attacks from a process of low priority: its work is that of other machines and takes little from this one."""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from tests.hostile import Attack, AttackedStation, attacked
from tests.hostile_devices import raise_descriptor_limit

_NICE = 10
_REPORT_SECONDS = 0.5
_STOP_SECONDS = 120


class AttackProcess:
    """Running attacks; ``runs`` counts those of each that have ended."""

    def __init__(self, reports: Connection, names: Sequence[str]) -> None:
        self._reports = reports
        self._runs = dict.fromkeys(names, 0)

    @property
    def runs(self) -> dict[str, int]:
        """How many runs of each attack have ended.

        Raises:
            EOFError: the process ended.
        """
        while self._reports.poll():
            self._runs = self._reports.recv()
        return self._runs


@contextlib.contextmanager
def attacking(station: AttackedStation, attacks: Sequence[Attack]) -> Iterator[AttackProcess]:
    """Run attacks in a process of their own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_attack, args=(station, attacks, theirs))
    process.start()
    try:
        yield AttackProcess(ours, [attack.__name__ for attack in attacks])
    finally:
        ours.send("stop")
        process.join(_STOP_SECONDS)
    assert process.exitcode == 0


def _attack(station: AttackedStation, attacks: Sequence[Attack], connection: Connection) -> None:
    os.setsid()
    os.nice(_NICE)
    with contextlib.suppress(OSError):  # where the kernel schedules sessions as groups, their priority counts
        Path("/proc/self/autogroup").write_text(f"{_NICE}\n", encoding="ascii")
    raise_descriptor_limit()
    with attacked(station, attacks) as runs:
        while not connection.poll(_REPORT_SECONDS):
            connection.send(dict(runs))
