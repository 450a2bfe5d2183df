"""Several replicas behind a front: what a frame costs, what replicas bring, and how far one front goes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bench.setup.options import BundleOption, DtypeOption, JsonOption, TargetOption, console
from bench.setup.results import Results, Row, number
from bench.station.front_cost import FRONT, measure_frames
from bench.station.recording import read_recordings
from bench.station.replay_client import ReplayTiming
from bench.station.replicas import ReplicaSetup, Round, measure_replicas, measure_single
from bench.station.scale_out import DeviceTimes, PassTimes, rounds_per_second, simulate
from protocol.bundle import Manifest


def cluster(
    bundle: BundleOption,
    target: TargetOption,
    recording: Annotated[Path, typer.Option(help="Recorded rounds, written by edgedraft-bench capacity --recording.")],
    dtype: DtypeOption = "bfloat16",
    replicas: Annotated[int, typer.Option(help="Replicas on this machine.", min=1)] = 2,
    devices: Annotated[int, typer.Option(help="Devices that generate at once.", min=1)] = 16,
    frame_bytes: Annotated[int, typer.Option(help="Bytes of a frame where its cost is measured.", min=32)] = 64,
    rtt_ms: Annotated[float, typer.Option(help="Round trip of the devices' links.", min=0)] = 20.0,
    seconds: Annotated[float, typer.Option(help="Duration of each measurement.", min=1)] = 10.0,
    kv_memory: Annotated[str, typer.Option(help="KV-cache memory of each replica.")] = "512MiB",
    json_file: JsonOption = None,
) -> None:
    """Measure a front and replicas with replayed devices, and simulate up to a million devices."""
    recordings, manifest = read_recordings(recording), Manifest.read(bundle)
    setup = ReplicaSetup(target, dtype, kv_memory, devices, seconds, ReplayTiming(delay_seconds=rtt_ms / 2e3))
    frames = measure_frames(seconds, devices, frame_bytes)
    single, rounds = measure_single(setup, recordings, manifest)
    several, _ = measure_replicas(replicas, setup, recordings, manifest)
    device = DeviceTimes.of(recordings, number(single, "tokens_per_round"), rtt_ms / 1e3)
    simulated = simulated_rows(device, devices, rounds, frames)
    settings: Row = {"target": target, "dtype": dtype, "seconds": seconds, "frame_bytes": frame_bytes, "rtt_ms": rtt_ms}
    measured = Results(settings, [*frames, single, several, *simulated])
    measured.show(console)
    measured.write(json_file)


def simulated_rows(device: DeviceTimes, devices: int, rounds: Sequence[Round], frames: Sequence[Row]) -> list[Row]:
    """The simulation from the passes of these rounds and from what a frame costs the front.

    Its first row is the one process that was measured with so many devices, to compare.
    """
    from basestation.engine.scheduler import PassBudget  # imports PyTorch

    passes, pass_tokens = PassTimes.of(rounds), PassBudget().tokens
    simulated = device.committed * rounds_per_second(devices, device, passes, pass_tokens)
    frame_seconds = next(number(row, "cpu_microseconds_per_frame") for row in frames if row["case"] == FRONT) / 1e6
    check: Row = {"case": "one process, simulated", "devices": devices, "tokens_per_second": simulated}
    return [check, *simulate(device, passes, pass_tokens, frame_seconds)]
