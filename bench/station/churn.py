"""A base station while devices come and go: its memory stays bounded, and it loses no session."""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import psutil
import typer

from basestation.monitoring.top import read_snapshot
from bench.setup.options import BundleOption, DtypeOption, JsonOption, TargetOption, console, progress_bar
from bench.setup.results import Results, Row
from bench.setup.station_process import StationProcess, station_process
from bench.station.load_generator import LoadGenerator
from bench.station.recording import Recording, read_recordings
from bench.station.replay_client import ReplayClient, ReplayTiming
from protocol.bundle import Manifest
from protocol.messages import Mode

_SLICE_SECONDS = 0.5
_ROWS = 10


def churn(
    bundle: BundleOption,
    target: TargetOption,
    recording: Annotated[Path, typer.Option(help="Recorded rounds, written by edgedraft-bench capacity --recording.")],
    dtype: DtypeOption = "bfloat16",
    sessions: Annotated[int, typer.Option(help="Sessions in total.", min=1)] = 1000,
    seconds: Annotated[float, typer.Option(help="Duration of the run.", min=0.1)] = 600.0,
    concurrent: Annotated[int, typer.Option(help="Sessions at a time.", min=1)] = 32,
    idle_timeout: Annotated[
        int, typer.Option(help="Seconds after which the base station closes an idle session.", min=1)
    ] = 30,
    kv_memory: Annotated[str, typer.Option(help="KV-cache memory of the base station.")] = "512MiB",
    json_file: JsonOption = None,
) -> None:
    """Measure a base station's memory while devices connect, close and vanish."""
    recordings, manifest = read_recordings(recording), Manifest.read(bundle)
    settings = ChurnSettings(sessions, seconds, concurrent)
    options = ["--idle-timeout", str(idle_timeout), "--kv-memory", kv_memory]
    with progress_bar() as progress, station_process(target, dtype, options) as station:
        task = progress.add_task("churn", total=_ROWS)
        rows = measure_churn(station, recordings, manifest, settings, lambda: progress.advance(task))
    measured = Results({"target": target, "dtype": dtype, "concurrent": concurrent, "kv_memory": kv_memory}, rows)
    measured.show(console)
    measured.write(json_file)


@dataclass(frozen=True)
class ChurnSettings:
    """``sessions`` start within ``seconds``, ``concurrent`` of them at a time."""

    sessions: int = 1000
    seconds: float = 600.0
    concurrent: int = 32
    timing: ReplayTiming = field(default_factory=ReplayTiming)


def measure_churn(
    station: StationProcess,
    recordings: Sequence[Recording],
    manifest: Manifest,
    settings: ChurnSettings,
    advance: Callable[[], object],
) -> list[Row]:
    """A row for each tenth of the time: the base station's memory and counters.

    A session runs for a while; then its device closes it, or every other time only
    drops the connection.

    Raises:
        FaultError: the base station answered a device with a Fault.
    """
    rng = random.Random(0)  # noqa: S311 - a simulation
    began, opened = time.monotonic(), 0
    rows: list[Row] = []
    process, clients = psutil.Process(station.pid), list[ReplayClient]()
    with closing(LoadGenerator(station.address, manifest.vocab_size, [])) as load:
        while (elapsed := time.monotonic() - began) < settings.seconds:
            while opened < min(settings.sessions, settings.sessions * elapsed / settings.seconds):
                recording = recordings[opened % len(recordings)]
                clients.append(ReplayClient(recording, Mode.IDS, settings.timing, manifest))
                load.add(clients[-1])
                opened += 1
            while len(clients) > settings.concurrent:
                load.remove(clients.pop(rng.randrange(len(clients))), abruptly=opened % 2 == 0)
            load.run(_SLICE_SECONDS)
            if elapsed >= settings.seconds * (len(rows) + 1) / _ROWS:
                rows.append(_row(station, process, elapsed, opened))
                advance()
        rows.append(_row(station, process, time.monotonic() - began, opened))
    return rows


def _row(station: StationProcess, process: psutil.Process, elapsed: float, opened: int) -> Row:
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
