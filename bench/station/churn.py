"""A base station while devices come and go: whether its memory stays as it is, and whether it loses a session."""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import psutil

from basestation.top import read_snapshot
from bench.setup.results import Value
from bench.setup.station_process import StationProcess
from bench.station.replay import Pace, Player, Recording, Stage
from protocol.bundle import Manifest
from protocol.messages import Mode

_SLICE_SECONDS = 0.5
_ROWS = 10


@dataclass(frozen=True)
class ChurnSettings:
    """How many ``sessions`` come in ``seconds``, ``at_once`` of them at a time, and how fast each is."""

    sessions: int = 1000
    seconds: float = 600.0
    at_once: int = 32
    pace: Pace = field(default_factory=Pace)


def measure_churn(
    station: StationProcess,
    recordings: Sequence[Recording],
    manifest: Manifest,
    settings: ChurnSettings,
    advance: Callable[[], object],
) -> list[dict[str, Value]]:
    """A row for each tenth of the time: the station's memory, and what it has seen.

    A session is used for a while, then closed by its device or, every other one,
    killed: the connection ends without a word.

    Raises:
        FaultError: the base station found fault with a session that its device had not dropped.
    """
    chance = random.Random(0)  # noqa: S311 - any order will do
    began, opened = time.monotonic(), 0
    rows: list[dict[str, Value]] = []
    process, players = psutil.Process(station.pid), list[Player]()
    with closing(Stage(station.address, manifest.vocab_size, [])) as stage:
        while (elapsed := time.monotonic() - began) < settings.seconds:
            while opened < min(settings.sessions, settings.sessions * elapsed / settings.seconds):
                players.append(Player(recordings[opened % len(recordings)], Mode.IDS, settings.pace, manifest))
                stage.enter(players[-1])
                opened += 1
            while len(players) > settings.at_once:
                stage.leave(players.pop(chance.randrange(len(players))), without_a_word=opened % 2 == 0)
            stage.play(_SLICE_SECONDS)
            if elapsed >= settings.seconds * (len(rows) + 1) / _ROWS:
                rows.append(_row(station, process, elapsed, opened))
                advance()
        rows.append(_row(station, process, time.monotonic() - began, opened))
    return rows


def _row(station: StationProcess, process: psutil.Process, elapsed: float, opened: int) -> dict[str, Value]:
    snapshot = read_snapshot(station.metrics_url)
    return {
        "case": f"after {elapsed:.0f} s",
        "opened": opened,
        "sessions": int(snapshot.total("sessions")),
        "rounds": int(snapshot.total("rounds_total")),
        "evictions": int(snapshot.total("evictions_total")),
        "faults": int(snapshot.total("faults_total")),
        "resident_mib": process.memory_info().rss / 2**20,
    }
