"""Prometheus metrics of the base station. docs/operations.md explains each."""

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric

from basestation.devices.peer import Peer
from basestation.engine.pass_records import PassRecord
from basestation.monitoring.fleet_metrics import FleetMetrics
from protocol.messages import Mode

if TYPE_CHECKING:
    from basestation.kv_cache.kv_pool import KVPool  # imports PyTorch

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
NO_SESSION = "none"
"""The mode label of messages outside of a session."""


class Metrics:
    """The metrics of one base station, in a registry of their own.

    Attributes:
        registry: what Prometheus scrapes.
        fleet: the metrics of each device.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.fleet = FleetMetrics(self.registry)
        self._sessions = self._gauge("sessions", "Open sessions.")
        self._kv_used = self._gauge("kv_positions_used", "Allocated KV-cache positions.")
        self._kv_shared = self._gauge("kv_positions_shared", "KV-cache positions saved by prefix sharing.")
        self._kv_capacity = self._gauge("kv_positions_capacity", "KV-cache positions that fit into the KV pool.")
        self._placement = Info(
            "edgedraft_target", "Where the target runs, and in which data type.", registry=self.registry
        )
        self._free_memory = self._gauge("free_memory_bytes", "Free memory where the target runs.")
        self._queueing_delay = self._histogram(
            "queueing_delay_seconds",
            "Queueing delay: from a request being ready to the start of its forward pass.",
            _SECONDS,
        )
        self._forward = self._histogram("forward_seconds", "Time of a forward pass of the target.", _SECONDS)
        self._verify = self._histogram("verify_seconds", "Time to verify the rounds of a forward pass.", _SECONDS)
        self._batch_sessions = self._histogram("batch_sessions", "Sessions in a forward pass.", _COUNTS)
        self._batch_tokens = self._histogram("batch_tokens", "Tokens in a forward pass.", _COUNTS)
        self._rounds = self._counter("rounds", "Verified rounds.", "mode")
        self._drafted = self._counter("drafted_tokens", "Verified drafted tokens.", "mode")
        self._accepted = self._counter("accepted_tokens", "Accepted drafted tokens.", "mode")
        self._drafted_at = self._counter(
            "drafted_tokens_at", "Verified drafted tokens by position in their round.", "position"
        )
        self._accepted_at = self._counter(
            "accepted_tokens_at", "Accepted drafted tokens by position in their round.", "position"
        )
        self._uplink = self._counter("uplink_bytes", "Bytes received in the TCP stream.", "mode")
        self._downlink = self._counter("downlink_bytes", "Bytes sent in the TCP stream.", "mode")
        self._faults = self._counter("faults", "Faults sent to devices.", "code")
        self._idle = self._counter("idle_seconds", "Time in which the engine waited for requests.")
        self._evictions = self._counter("evictions", "KV caches evicted to make room for others.")
        self._gathered = self._counter(
            "kv_gathered", "Sessions in forward passes whose KV-cache pages were copied into one run."
        )
        self._unreadable_keys = self._counter("unreadable_keys", "Key files that could not be looked at.")
        self._out_of_memory = self._counter("out_of_memory", "Forward passes that ran out of memory.")

    def totals(self) -> Iterable[Metric]:
        """All samples, for figures over time."""
        return self.registry.collect()

    def watch(self, sessions: Callable[[], Mapping[str, int]], kv_pool: "KVPool") -> None:
        """Read the gauges from these whenever the metrics are scraped; ``sessions`` counts them by device."""
        self._sessions.set_function(lambda: sum(sessions().values()))
        self.fleet.watch(sessions)
        self._kv_used.set_function(lambda: kv_pool.used)
        self._kv_shared.set_function(lambda: kv_pool.shared)
        self._kv_capacity.set(kv_pool.capacity)

    def describe_target(self, placement: Mapping[str, str], free_memory: Callable[[], int]) -> None:
        """Say where the target runs, and read the free memory there whenever the metrics are scraped."""
        self._placement.info(dict(placement))
        self._free_memory.set_function(free_memory)

    def count_pass(self, record: PassRecord) -> None:
        """Count a forward pass and the rounds it verified."""
        self._forward.observe(record.forward_seconds)
        self._verify.observe(record.verify_seconds)
        self._batch_sessions.observe(record.sessions)
        self._batch_tokens.observe(record.tokens)
        self._gathered.inc(record.gathered)
        drafted, accepted = collections.Counter[int](), collections.Counter[int]()
        for one in record.rounds:
            self._queueing_delay.observe(one.queueing_delay)
            self._rounds.labels(one.mode).inc()
            self._drafted.labels(one.mode).inc(one.drafted)
            self._accepted.labels(one.mode).inc(one.accepted)
            drafted.update(range(1, one.drafted + 1))
            accepted.update(range(1, one.accepted + 1))
        for counter, counts in ((self._drafted_at, drafted), (self._accepted_at, accepted)):
            for position, count in counts.items():
                counter.labels(position).inc(count)

    def count_uplink(self, peer: Peer, mode: Mode | None, size: int) -> None:
        """Count a received message, of a session with that mode or of none."""
        self._uplink.labels(mode or NO_SESSION).inc(size)
        self.fleet.count_uplink(peer.name, size)

    def count_downlink(self, peer: Peer, mode: Mode | None, size: int) -> None:
        """Count a sent message, of a session with that mode or of none."""
        self._downlink.labels(mode or NO_SESSION).inc(size)
        self.fleet.count_downlink(peer.name, size)

    def count_fault(self, peer: Peer, code: str, text: str) -> None:
        """Count a Fault that was sent."""
        self._faults.labels(code).inc()
        self.fleet.count_fault(peer.name, code, text)

    def count_unreadable_key(self) -> None:
        """Count a key file that could not be looked at."""
        self._unreadable_keys.inc()

    def count_eviction(self) -> None:
        """Count an eviction."""
        self._evictions.inc()

    def count_idle(self, seconds: float) -> None:
        """Count time in which the engine waited for requests."""
        self._idle.inc(seconds)

    def count_out_of_memory(self) -> None:
        """Count a forward pass that ran out of memory."""
        self._out_of_memory.inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"edgedraft_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"edgedraft_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"edgedraft_{name}", text, buckets=buckets, registry=self.registry)
