"""A base station's metrics at one time: read from its registry, or from the text of a scrape."""

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client import Metric

_PREFIX = "edgedraft_"
_REPLICA = "replica"
_TIME = "_timestamp_seconds"


@dataclass(frozen=True)
class Snapshot:
    """All samples at one time: for each name, the values by label, over all replicas."""

    time: float
    samples: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, families: Iterable[Metric], now: float) -> "Snapshot":
        """The samples of metric families without the buckets of histograms; labels are joined with commas.

        Those of several replicas are added; of times, the latest is taken.
        """
        samples: dict[str, dict[str, float]] = defaultdict(dict)
        for family in families:
            for sample in family.samples:
                if sample.name.startswith(_PREFIX) and "le" not in sample.labels:
                    values = samples[sample.name.removeprefix(_PREFIX)]
                    label = ",".join(value for name, value in sample.labels.items() if name != _REPLICA)
                    join = max if sample.name.endswith(_TIME) else operator.add
                    values[label] = join(values.get(label, 0.0), sample.value)
        return cls(now, dict(samples))

    def total(self, name: str) -> float:
        """The sum over all labels."""
        return sum(self.samples.get(name, {}).values())

    def value(self, name: str, label: str) -> float:
        """The value of one label, 0 where it does not exist."""
        return self.samples.get(name, {}).get(label, 0.0)
