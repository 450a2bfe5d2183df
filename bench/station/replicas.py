"""Replayed devices on one process, and on replicas behind a front on the same machine."""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import psutil

from bench.setup.results import Row
from bench.setup.station_process import StationProcess, replica_names, station_process
from bench.station.load_generator import LoadGenerator
from bench.station.ray_nodes import ray_nodes
from bench.station.recording import Recording
from bench.station.replay_client import ReplayClient, ReplayTiming, Score
from protocol.bundle import Manifest
from protocol.errors import LinkError
from protocol.messages import Mode

_START_SECONDS = 120.0
_RECORD = "rounds.jsonl"

Round: TypeAlias = Mapping[str, Any]
"""A line of ``--record``."""


@dataclass(frozen=True)
class ReplicaSetup:
    """What is served, and to how many replayed devices.

    Attributes:
        target: model.
        dtype: of the target.
        kv_memory: of each replica.
        devices: that generate at the same time.
        seconds: that are measured.
        timing: of the devices.
    """

    target: str
    dtype: str
    kv_memory: str
    devices: int
    seconds: float
    timing: ReplayTiming


def measure_single(setup: ReplicaSetup, recordings: Sequence[Recording], manifest: Manifest) -> tuple[Row, list[Round]]:
    """The row of one process, and its rounds."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--kv-memory", setup.kv_memory, "--record", f"{folder}/{_RECORD}"]
        with station_process(setup.target, setup.dtype, options) as station:
            score, began, elapsed = _replay(station, setup, recordings, manifest)
        rounds = _rounds(Path(folder), began)
    return _row("one process", setup, score, elapsed, rounds, None), rounds


def measure_replicas(
    replicas: int, setup: ReplicaSetup, recordings: Sequence[Recording], manifest: Manifest
) -> tuple[Row, list[Round]]:
    """The row of a number of replicas, each on a node of Ray, and their rounds.

    Raises:
        LinkError: not all replicas serve within two minutes.
    """
    with tempfile.TemporaryDirectory() as folder, ray_nodes(replicas) as address:
        placed = ["--replicas", str(replicas), "--replica-cpus", "1", "--ray-address", address]
        options = ["--kv-memory", setup.kv_memory, "--record", f"{folder}/{_RECORD}"]
        with station_process(setup.target, setup.dtype, [*placed, *options]) as station:
            _wait_for(station, replicas)
            front = _front(station)
            before, start = front.cpu_times(), time.monotonic()
            score, began, elapsed = _replay(station, setup, recordings, manifest)
            now, end = front.cpu_times(), time.monotonic()
        rounds = _rounds(Path(folder), began)
    used = now.user + now.system - before.user - before.system
    return _row(f"{replicas} replicas", setup, score, elapsed, rounds, used / (end - start)), rounds


def _replay(
    station: StationProcess, setup: ReplicaSetup, recordings: Sequence[Recording], manifest: Manifest
) -> tuple[Score, float, float]:
    """The score of all devices; when they were counted from, in seconds since 1970, and for how long."""
    clients = [
        ReplayClient(recordings[index % len(recordings)], Mode.IDS, setup.timing, manifest)
        for index in range(setup.devices)
    ]
    with closing(LoadGenerator(station.address, manifest.vocab_size, clients)) as load:
        load.warm_up(clients)  # until all prompts are computed
        began, start = time.time(), time.monotonic()
        load.run(setup.seconds)
        elapsed = time.monotonic() - start
        score = Score.sum(client.score for client in clients)
        load.drain()
    return score, began, elapsed


def _rounds(folder: Path, since: float) -> list[Round]:
    """The rounds of all replicas since then; ``replica`` is the file that has them."""
    rows = [
        {**json.loads(line), "replica": path.name}
        for path in sorted(folder.iterdir())
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [row for row in rows if row["time"] >= since]


def _row(
    case: str, setup: ReplicaSetup, score: Score, elapsed: float, rounds: Sequence[Round], front: float | None
) -> Row:
    names = sorted({one["replica"] for one in rounds})
    shares = (sum(one["replica"] == name for one in rounds) / len(rounds) for name in names)
    return {
        "case": case,
        "devices": setup.devices,
        "tokens_per_second": score.tokens / elapsed,
        "tokens_per_round": score.tokens / max(1, len(score.rounds)),
        "shares": ", ".join(f"{share:.0%}" for share in shares),
        "front_core_share": front,
    }


def _front(station: StationProcess) -> psutil.Process:
    """The child of ``serve`` that routes."""
    children = psutil.Process(station.pid).children()
    return next(one for one in children if "spawn_main" in " ".join(one.cmdline()))


def _wait_for(station: StationProcess, replicas: int) -> None:
    end = time.monotonic() + _START_SECONDS
    while len(names := replica_names(station.metrics_url)) < replicas:
        if time.monotonic() > end:
            raise LinkError(f"{len(names)} of {replicas} replicas serve after {_START_SECONDS:.0f} s")
        time.sleep(0.5)
