"""A simulation of many replicas from measured times: how many devices they serve, and how many fronts that takes.

One replica and its devices are simulated, in steps of forward passes. Replicas do not
wait for each other, so that a number of them serves as many times the devices.
"""

import heapq
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from bench.setup.results import Row
from bench.station.recording import Recording
from protocol.errors import SettingsError

_SECONDS = 30.0
_REPLICAS = (1, 10, 100, 1000)
_MANY_DEVICES = 1_000_000
_LEAST_SHARE = 0.5
"""A replica is full where a device gets this share of what a lone one gets."""
_MOST_DEVICES = 10_000
_JITTER = 0.3
"""A device thinks this much longer or shorter, so that devices do not move in step."""


@dataclass(frozen=True)
class PassTimes:
    """The time of a forward pass: ``seconds``, and ``token_seconds`` for each token."""

    seconds: float
    token_seconds: float

    @classmethod
    def of(cls, rounds: Sequence[Mapping[str, float]]) -> Self:
        """The line through the passes of recorded rounds.

        Raises:
            SettingsError: they are of fewer than two sizes.
        """
        passes = {one["time"]: (one["batch_tokens"], one["forward_seconds"] + one["verify_seconds"]) for one in rounds}
        tokens, seconds = (np.array(column) for column in zip(*passes.values(), strict=True))
        if len(set(tokens)) < 2:
            raise SettingsError("sessions", len(set(tokens)), "more, or longer: all passes had one size")
        slope, intercept = np.polyfit(tokens, seconds, 1)
        return cls(max(0.0, float(intercept)), max(0.0, float(slope)))


@dataclass(frozen=True)
class DeviceTimes:
    """A device: tokens that a round drafts and commits on average, and the seconds between two rounds."""

    drafted: float
    committed: float
    think_seconds: float

    @classmethod
    def of(cls, recordings: Sequence[Recording], committed: float, link_seconds: float) -> Self:
        """A device that drafts as recorded."""
        drafts = [len(draft) for one in recordings for draft in one.drafts]
        drafted = sum(drafts) / len(drafts)
        token_seconds = sum(one.token_seconds for one in recordings) / len(recordings)
        return cls(drafted, committed, drafted * token_seconds + link_seconds)


def rounds_per_second(devices: int, device: DeviceTimes, passes: PassTimes, pass_tokens: int) -> float:
    """Rounds that a replica verifies in a second for so many devices."""
    draw = random.Random(0)  # noqa: S311 - a simulation
    most = max(1, int(pass_tokens / (device.drafted + 1)))
    ready = [draw.uniform(0, device.think_seconds) for _ in range(devices)]
    heapq.heapify(ready)
    now, rounds = 0.0, 0
    while now < _SECONDS:
        now = max(now, ready[0])
        batch = 0
        while batch < most and ready and ready[0] <= now:
            heapq.heappop(ready)
            batch += 1
        now += passes.seconds + batch * (device.drafted + 1) * passes.token_seconds
        rounds += batch
        for _ in range(batch):
            heapq.heappush(ready, now + device.think_seconds * draw.uniform(1 - _JITTER, 1 + _JITTER))
    return rounds / now


def devices_of_a_replica(device: DeviceTimes, passes: PassTimes, pass_tokens: int) -> int:
    """The most devices of which each still gets half of what a lone one gets."""
    alone = rounds_per_second(1, device, passes, pass_tokens)
    least, most = 1, _MOST_DEVICES
    while most - least > 1:
        middle = (least + most) // 2
        share = rounds_per_second(middle, device, passes, pass_tokens) / middle / alone
        least, most = (middle, most) if share >= _LEAST_SHARE else (least, middle)
    return least


def simulate(device: DeviceTimes, passes: PassTimes, pass_tokens: int, frame_seconds: float) -> list[Row]:
    """Rows for numbers of replicas, for a million devices, and for as many as one front is enough for.

    Args:
        device: each of them.
        passes: of each replica.
        pass_tokens: in one forward pass at most.
        frame_seconds: CPU time of a frame at the front; a round is two frames.
    """
    full = devices_of_a_replica(device, passes, pass_tokens)
    rounds = rounds_per_second(full, device, passes, pass_tokens)
    of_one_front = 1 / (2 * rounds * frame_seconds)
    sizes = [(f"{count} full replicas", float(count)) for count in _REPLICAS]
    sizes += [(f"{_MANY_DEVICES:,} devices", _MANY_DEVICES / full), ("one front is full", of_one_front)]
    return [
        {
            "case": case,
            "replicas": round(replicas),
            "devices": round(replicas * full),
            "tokens_per_second": replicas * rounds * device.committed,
            "tokens_per_second_of_a_device": rounds * device.committed / full,
            "frames_per_second": 2 * rounds * replicas,
            "fronts": replicas / of_one_front,
            "busiest_over_mean": _busiest_over_mean(round(replicas), round(replicas * full)),
        }
        for case, replicas in sizes
    ]


def _busiest_over_mean(replicas: int, devices: int) -> float:
    """Devices of the replica that rendezvous hashing proposes most often, over the mean."""
    counts = np.random.default_rng(0).multinomial(devices, [1 / replicas] * replicas)
    return float(counts.max() * replicas / devices)
