"""The metrics of a front: its own and those that the replicas report, each with the label ``replica``."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from basestation.monitoring.metrics import Metrics
from basestation.replicas.inner_messages import Report

FRONT = "front"
"""The label of the front's own metrics."""
_OWN = ("edgedraft_uplink", "edgedraft_downlink", "edgedraft_faults", "edgedraft_unreadable", "edgedraft_fleet")
"""What the names of the front's own metrics start with; it runs no passes."""
_MAX_ENDED = 100
"""Processes that are gone, each with its own counts: one that was only silent reports again."""
_COUNTS = ("counter", "histogram")


class FrontMetrics(Metrics):
    """Counters of the front, whose registry has the replicas' metrics too."""

    def __init__(self) -> None:
        super().__init__()
        self._merged = _MergedMetrics(self.registry)
        self.registry = CollectorRegistry()
        self.registry.register(self._merged)

    def take(self, identity: bytes, report: Report) -> None:
        """Take what a replica reported; ``identity`` is of its process, which may have been thought to be gone."""
        self._merged.ended_counts.pop(identity, None)
        self._merged.texts[report.name] = report.metrics
        self.fleet.faults.take(report.name, report.faults)

    def drop(self, identity: bytes, name: str) -> None:
        """Scrape a replica that is gone no longer; keep its counts in the totals, and its faults."""
        self._merged.end(identity, name)

    def totals(self) -> Iterable[Metric]:
        """All samples, and the counts of replicas that are gone, so that no total falls."""
        return [*self.registry.collect(), *self._merged.ended()]


class _MergedMetrics(Collector):
    """Families of all processes by name."""

    def __init__(self, own: CollectorRegistry) -> None:
        self._own = own
        self.ended_counts: dict[bytes, dict[tuple[str, str], float]] = {}
        self._long_ended: Counter[tuple[str, str]] = Counter()
        self.texts: dict[str, str] = {}

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for name, family in self._families():
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [sample._replace(labels={**sample.labels, "replica": name}) for sample in family.samples]
        return families.values()

    def end(self, identity: bytes, name: str) -> None:
        """Keep the last counts of a replica's process that is gone."""
        self._forget_identities()
        self.ended_counts[identity] = {
            (sample.name, json.dumps(sample.labels)): sample.value
            for family in text_string_to_metric_families(self.texts.pop(name, ""))
            for sample in (family.samples if family.type in _COUNTS else ())
            if "le" not in sample.labels
        }

    def _forget_identities(self) -> None:
        """Of many processes that are gone, add up the counts of the oldest: they do not come back."""
        while len(self.ended_counts) >= _MAX_ENDED:
            self._long_ended.update(self.ended_counts.pop(next(iter(self.ended_counts))))

    def ended(self) -> Iterable[Metric]:
        """The counts of the processes that are gone."""
        totals = self._long_ended.copy()
        for counts in self.ended_counts.copy().values():
            totals.update(counts)
        for (name, labels), value in totals.items():
            family = Metric(name, "", "untyped")
            family.add_sample(name, json.loads(labels), value)
            yield family

    def _families(self) -> Iterator[tuple[str, Metric]]:
        for family in text_string_to_metric_families(generate_latest(self._own).decode()):
            if family.name.startswith(_OWN):
                yield FRONT, family
        for name, text in self.texts.copy().items():
            yield from ((name, family) for family in text_string_to_metric_families(text))
