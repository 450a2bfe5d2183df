"""Prometheus metrics of the device's service. docs/operations.md explains each."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from device.answers.job import Finish
from device.link.link import Link
from device.session.round_records import RoundRecord
from protocol.errors import EdgedraftError, FaultError

_PREFIX = "edgedraft_device_"
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_DEFECT = "internal"
"""The code of an error that is not one of ours."""


class Metrics:
    """The metrics of one service, in a registry of their own.

    Attributes:
        registry: what Prometheus scrapes.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._answers = self._counter("answers", "Finished answers.", "finish_reason")
        self._errors = self._counter("errors", "Requests that failed.", "code")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished answers.")
        self._new_tokens = self._counter("new_tokens", "Tokens of finished answers.")
        self._rounds = self._counter("rounds", "Verified rounds.", "mode")
        self._drafted = self._counter("drafted_tokens", "Verified drafted tokens.", "mode")
        self._accepted = self._counter("accepted_tokens", "Accepted drafted tokens.", "mode")
        self._answer_seconds = self._histogram("answer_seconds", "From taking a request to the end of its answer.")
        self._draft_seconds = self._histogram("draft_seconds", "Time to draft a round.")
        self._reply_seconds = self._histogram("reply_seconds", "Round trip: from sending a Draft to its Verdict.")
        self._waiting = self._gauge("waiting_requests", "Requests that wait for the one that is answered.")
        self._reachable = self._gauge("station_reachable", "1 if the base station answered recently, else 0.")
        self._links = _LinkBytes()
        self.registry.register(self._links)

    def watch(self, waiting: Callable[[], int], reachable: Callable[[], bool]) -> None:
        """Read the gauges from these whenever the metrics are scraped."""
        self._waiting.set_function(waiting)
        self._reachable.set_function(reachable)

    def watch_link(self, link: Link) -> None:
        """Count the bytes of a new link, which replaces the last one."""
        self._links.add(link)

    def count_round(self, record: RoundRecord) -> None:
        """Count a round whose Verdict arrived."""
        self._rounds.labels(record.mode).inc()
        self._drafted.labels(record.mode).inc(record.drafted)
        self._accepted.labels(record.mode).inc(record.accepted)
        self._reply_seconds.observe(record.reply_seconds)
        if record.drafted:
            self._draft_seconds.observe(record.draft_seconds)

    def count_outcome(self, outcome: Finish | Exception, seconds: float) -> None:
        """Count an answer that took ``seconds``, or its error."""
        if isinstance(outcome, Exception):
            self.count_error(outcome)
            return
        self._answers.labels(outcome.reason).inc()
        self._prompt_tokens.inc(outcome.prompt_tokens)
        self._new_tokens.inc(outcome.new_tokens)
        self._answer_seconds.observe(seconds)

    def count_error(self, error: Exception) -> None:
        """Count a request that failed."""
        self._errors.labels(_code(error)).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"{_PREFIX}{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"{_PREFIX}{name}", text, buckets=_SECONDS, registry=self.registry)


class _LinkBytes(Collector):
    """The bytes of all links so far: of the present one, and the sum of those before."""

    def __init__(self) -> None:
        self._link: Link | None = None
        self._before = (0, 0)

    def add(self, link: Link) -> None:
        self._before = self._total()
        self._link = link

    def collect(self) -> Iterable[CounterMetricFamily]:
        uplink, downlink = self._total()
        yield CounterMetricFamily(f"{_PREFIX}uplink_bytes", "Bytes sent in the TCP stream.", uplink)
        yield CounterMetricFamily(f"{_PREFIX}downlink_bytes", "Bytes received in the TCP stream.", downlink)

    def _total(self) -> tuple[int, int]:
        uplink, downlink = self._before
        link = self._link
        return (uplink + link.uplink_bytes, downlink + link.downlink_bytes) if link else (uplink, downlink)


def _code(error: Exception) -> str:
    """The code of an error; a base station may send any code, and only those that exist become labels."""
    if isinstance(error, FaultError) and error.fault_code in _CODES:
        return error.fault_code
    return error.code if isinstance(error, EdgedraftError) else _DEFECT


def _codes(kind: type[EdgedraftError]) -> Iterator[str]:
    yield kind.code
    for derived in kind.__subclasses__():
        yield from _codes(derived)


_CODES = frozenset(_codes(EdgedraftError))
