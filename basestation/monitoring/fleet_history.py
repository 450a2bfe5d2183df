"""The last minutes of a base station and its devices: samples of the metrics that Prometheus scrapes."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from basestation.devices.key_folder import KeyFolder
from basestation.monitoring.metrics import Metrics
from basestation.monitoring.snapshot import Snapshot
from protocol.errors import KeyFileError

logger = logging.getLogger(__name__)

INTERVAL = 5.0
"""Seconds between two samples."""
SAMPLES = 121
"""That are kept: ten minutes."""
_COUNTERS = ("rounds", "drafted_tokens", "accepted_tokens", "uplink_bytes", "downlink_bytes", "faults")


class Traffic(NamedTuple):
    """Counts since the start, of one device or of all; ``sessions`` is the number open."""

    sessions: float = 0
    rounds: float = 0
    drafted: float = 0
    accepted: float = 0
    uplink_bytes: float = 0
    downlink_bytes: float = 0
    faults: float = 0
    queueing_seconds: float = 0

    @classmethod
    def of_device(cls, snapshot: Snapshot, name: str) -> "Traffic":
        """The counts of one device."""
        values = (snapshot.value(f"fleet_{counter}_total", name) for counter in (*_COUNTERS, "queueing_seconds"))
        return cls._make((snapshot.value("fleet_sessions", name), *values))

    @classmethod
    def of_all(cls, snapshot: Snapshot) -> "Traffic":
        """The counts of the base station."""
        values = (snapshot.total(f"{counter}_total") for counter in _COUNTERS)
        return cls._make((snapshot.total("sessions"), *values, snapshot.total("queueing_delay_seconds_sum")))


class Passes(NamedTuple):
    """Forward passes since the start, and the KV pool now; times are sums in seconds."""

    passes: float
    batch_sessions: float
    batch_tokens: float
    forward_seconds: float
    verify_seconds: float
    evictions: float
    kv_used: float
    kv_capacity: float

    @classmethod
    def of(cls, snapshot: Snapshot) -> "Passes":
        """The counts of the base station."""
        sums = ("batch_sessions_sum", "batch_tokens_sum", "forward_seconds_sum", "verify_seconds_sum")
        gauges = ("kv_positions_used", "kv_positions_capacity")
        return cls(*map(snapshot.total, ("forward_seconds_count", *sums, "evictions_total", *gauges)))


@dataclass(frozen=True, slots=True)
class Sample:
    """The counts at one time, in seconds of the monotonic clock; ``devices`` by name."""

    time: float
    total: Traffic
    passes: Passes
    devices: Mapping[str, Traffic]


class FleetHistory:
    """The samples of the last ten minutes, taken in a thread of their own.

    Args:
        metrics: that are sampled.
        keys: of the enrolled devices; None if the base station runs without keys.
        clock: seconds, monotonic.

    Attributes:
        last_seen: when each device last sent a message, in seconds since 1970.
        enrolled: names at the last sample; None if there are no keys, or the folder cannot be read.
        unreadable: why it cannot be read; empty if it can.
    """

    def __init__(
        self, metrics: Metrics, keys: KeyFolder | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._keys = keys
        self._clock = clock
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
        self.last_seen: Mapping[str, float] = {}
        self.enrolled: Sequence[str] | None = None
        self.unreadable = ""

    def start(self) -> None:
        """Take the first sample, and start the thread."""
        self.sample()
        self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        self._stopping.set()
        self._thread.join()

    def sample(self) -> None:
        """Take a sample, and look which devices are enrolled."""
        snapshot = Snapshot.of(self._metrics.totals(), self._clock())
        before = self._samples[-1].devices if self._samples else {}
        self.last_seen = snapshot.samples.get("fleet_last_seen_timestamp_seconds", {})
        devices = {name: Traffic.of_device(snapshot, name) for name in self.last_seen}
        for name, traffic in devices.items():
            if before.get(name) == traffic:
                devices[name] = before[name]  # an idle device takes no memory in each sample
        self._samples.append(Sample(snapshot.time, Traffic.of_all(snapshot), Passes.of(snapshot), devices))
        self._read_enrolled()

    @property
    def now(self) -> float:
        """The clock of the samples."""
        return self._clock()

    def samples(self) -> list[Sample]:
        """The samples, oldest first; at least one once it is started. Any thread may call it."""
        return [*self._samples.copy()]

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL):
            self.sample()

    def _read_enrolled(self) -> None:
        if self._keys is None:
            return
        try:
            self.enrolled, self.unreadable = [device.name for device in self._keys.devices()], ""
        except KeyFileError as error:
            if not self.unreadable:
                logger.error("cannot tell which devices are enrolled: %s", error)  # noqa: TRY400 - the message contains the reason
            self.enrolled, self.unreadable = None, str(error)
