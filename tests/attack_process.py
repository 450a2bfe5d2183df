"""Attacks from a process that runs when a core is idle: its work is that of other machines."""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

from tests.hostile import Attack, AttackedStation, attacked
from tests.hostile_devices import raise_descriptor_limit

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
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    raise_descriptor_limit()
    with attacked(station, attacks) as runs:
        while not connection.poll(_REPORT_SECONDS):
            connection.send(dict(runs))
