"""A base station's metrics at one time: read from its registry, or from the text of a scrape."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client import Metric

_PREFIX = "edgedraft_"


@dataclass(frozen=True)
class Snapshot:
    """All samples at one time: for each name, the values by label."""

    time: float
    samples: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, families: Iterable[Metric], now: float) -> "Snapshot":
        """The samples of metric families without the buckets of histograms; labels are joined with commas."""
        samples: dict[str, dict[str, float]] = defaultdict(dict)
        for family in families:
            for sample in family.samples:
                if sample.name.startswith(_PREFIX) and "le" not in sample.labels:
                    samples[sample.name.removeprefix(_PREFIX)][",".join(sample.labels.values())] = sample.value
        return cls(now, dict(samples))

    def total(self, name: str) -> float:
        """The sum over all labels."""
        return sum(self.samples.get(name, {}).values())

    def value(self, name: str, label: str) -> float:
        """The value of one label, 0 where it does not exist."""
        return self.samples.get(name, {}).get(label, 0.0)
