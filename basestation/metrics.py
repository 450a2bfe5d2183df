"""What the base station counts, for Prometheus. docs/operations.md says what each is for."""

from collections import Counter as Tally
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from basestation.kv_pool import KVPool
from basestation.pass_records import PassRecord
from protocol.messages import Mode

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
NO_SESSION = "none"
"""The mode of messages that belong to no session."""


class Metrics:
    """Counters of one base station, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._sessions = self._gauge("sessions", "Open sessions.")
        self._kv_used = self._gauge("kv_positions_used", "Positions of keys and values that sessions hold room for.")
        self._kv_shared = self._gauge("kv_positions_shared", "Positions besides that common beginnings save.")
        self._kv_capacity = self._gauge("kv_positions_capacity", "Positions of keys and values that fit.")
        self._queue = self._histogram("queue_seconds", "From when a round could be run until it was.", _SECONDS)
        self._forward = self._histogram("forward_seconds", "The target's forward pass.", _SECONDS)
        self._verify = self._histogram("verify_seconds", "Judging the rounds of a pass.", _SECONDS)
        self._pass_sessions = self._histogram("pass_sessions", "Sessions in a pass.", _COUNTS)
        self._pass_tokens = self._histogram("pass_tokens", "Tokens in a pass.", _COUNTS)
        self._rounds = self._counter("rounds", "Judged rounds.", "mode")
        self._drafted = self._counter("drafted_tokens", "Drafted tokens that were judged.", "mode")
        self._accepted = self._counter("accepted_tokens", "Drafted tokens that stand.", "mode")
        self._drafted_at = self._counter("drafted_tokens_at", "Drafted tokens by place in their round.", "position")
        self._accepted_at = self._counter("accepted_tokens_at", "Of those, the ones that stand.", "position")
        self._uplink = self._counter("uplink_bytes", "Received, as they lie in the TCP stream.", "mode")
        self._downlink = self._counter("downlink_bytes", "Sent, as they lie in the TCP stream.", "mode")
        self._faults = self._counter("faults", "Faults told to devices.", "code")
        self._idle = Counter("edgedraft_idle_seconds", "In which the engine had nothing to do.", registry=self.registry)
        self._evictions = Counter(
            "edgedraft_evictions", "Sessions that lost their keys and values to others.", registry=self.registry
        )
        self._shortages = Counter(
            "edgedraft_memory_shortages", "Passes that needed more memory than there was.", registry=self.registry
        )

    def watch(self, sessions: Callable[[], int], kv_pool: KVPool) -> None:
        """Ask these whenever somebody asks for the gauges."""
        self._sessions.set_function(sessions)
        self._kv_used.set_function(lambda: kv_pool.used)
        self._kv_shared.set_function(lambda: kv_pool.shared)
        self._kv_capacity.set(kv_pool.capacity)

    def count_pass(self, report: PassRecord) -> None:
        """A pass is done."""
        self._forward.observe(report.forward_seconds)
        self._verify.observe(report.verify_seconds)
        self._pass_sessions.observe(report.sessions)
        self._pass_tokens.observe(report.tokens)
        drafted, accepted = Tally[int](), Tally[int]()
        for one in report.rounds:
            self._queue.observe(one.queueing_delay)
            self._rounds.labels(one.mode).inc()
            self._drafted.labels(one.mode).inc(one.drafted)
            self._accepted.labels(one.mode).inc(one.accepted)
            drafted.update(range(1, one.drafted + 1))
            accepted.update(range(1, one.accepted + 1))
        for counter, counts in ((self._drafted_at, drafted), (self._accepted_at, accepted)):
            for position, count in counts.items():
                counter.labels(position).inc(count)

    def count_uplink(self, mode: Mode | None, size: int) -> None:
        """A message came, in a session of that mode or in none."""
        self._uplink.labels(mode or NO_SESSION).inc(size)

    def count_downlink(self, mode: Mode | None, size: int) -> None:
        """A message was sent."""
        self._downlink.labels(mode or NO_SESSION).inc(size)

    def count_fault(self, code: str) -> None:
        """A device was told that something is wrong."""
        self._faults.labels(code).inc()

    def count_eviction(self) -> None:
        """A session lost its keys and values."""
        self._evictions.inc()

    def count_idle(self, seconds: float) -> None:
        """The engine waited for something to do."""
        self._idle.inc(seconds)

    def count_out_of_memory(self) -> None:
        """A pass did not fit into the memory."""
        self._shortages.inc()

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"edgedraft_{name}", text, [label], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"edgedraft_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"edgedraft_{name}", text, buckets=buckets, registry=self.registry)
