"""Prometheus metrics of each device: counts by the name it is enrolled under.

The label ``device`` has as many values as devices are enrolled, and one more for all without a name.
"""

import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from basestation.devices.peer import UNNAMED
from basestation.monitoring.fault_log import FaultLog

_PREFIX = "edgedraft_fleet_"


class FleetMetrics:
    """The metrics of the devices of one base station.

    Args:
        registry: of the base station.

    Attributes:
        faults: the latest of each device.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.faults = FaultLog()
        self._rounds = _counter(registry, "rounds", "A device's verified rounds.")
        self._drafted = _counter(registry, "drafted_tokens", "A device's verified drafted tokens.")
        self._accepted = _counter(registry, "accepted_tokens", "A device's accepted drafted tokens.")
        self._queueing = _counter(registry, "queueing_seconds", "Sum of the queueing delays of a device's rounds.")
        self._uplink = _counter(registry, "uplink_bytes", "Bytes received from a device in the TCP stream.")
        self._downlink = _counter(registry, "downlink_bytes", "Bytes sent to a device in the TCP stream.")
        self._faults = _counter(registry, "faults", "Faults sent to a device.")
        self._last_seen = Gauge(
            f"{_PREFIX}last_seen_timestamp_seconds",
            "When a device last sent a message, in seconds since 1970.",
            ["device"],
            registry=registry,
        )
        self._sessions = _Sessions()
        registry.register(self._sessions)

    def watch(self, sessions: Callable[[], Mapping[str, int]]) -> None:
        """Read each device's open sessions from this whenever the metrics are read."""
        self._sessions.read = sessions

    def count_round(self, device: str, drafted: int, accepted: int, queueing_delay: float) -> None:
        """Count a verified round."""
        self._rounds.labels(device).inc()
        self._drafted.labels(device).inc(drafted)
        self._accepted.labels(device).inc(accepted)
        self._queueing.labels(device).inc(queueing_delay)

    def count_uplink(self, device: str, size: int) -> None:
        """Count a received message of ``size`` bytes."""
        self._uplink.labels(device).inc(size)
        self._last_seen.labels(device).set(time.time())

    def count_downlink(self, device: str, size: int) -> None:
        """Count a sent message of ``size`` bytes."""
        self._downlink.labels(device).inc(size)

    def count_fault(self, device: str, code: str, text: str) -> None:
        """Count a Fault that was sent, and keep it for display."""
        self._faults.labels(device).inc()
        self.faults.add(device, code, text)

    def forget(self, device: str) -> None:
        """Drop the metrics of a device that is not enrolled any more."""
        if device == UNNAMED:
            return
        self.faults.drop(device)
        counters = (self._rounds, self._drafted, self._accepted, self._queueing, self._uplink, self._downlink)
        for metric in (*counters, self._faults, self._last_seen):
            metric.remove(device)


class _Sessions(Collector):
    """A gauge whose devices are those that have sessions now."""

    def __init__(self) -> None:
        self.read: Callable[[], Mapping[str, int]] = dict

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily(f"{_PREFIX}sessions", "A device's open sessions.", labels=["device"])
        for device, count in self.read().items():
            family.add_metric([device], count)
        yield family


def _counter(registry: CollectorRegistry, name: str, text: str) -> Counter:
    return Counter(f"{_PREFIX}{name}", text, ["device"], registry=registry)
