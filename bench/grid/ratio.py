"""Paired figures compared: the median of their ratios, with an interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios with a bootstrap 95 % interval, and the smallest of them."""

    median: float
    low: float
    high: float
    worst: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> "Ratio":
        """Of two figures of each answer, in the same order."""
        ratios = np.array(numerators) / np.array(denominators)
        low = high = float(ratios[0])
        if len(ratios) > 1:
            interval = stats.bootstrap((ratios,), np.median, method="percentile", rng=1).confidence_interval
            low, high = float(interval.low), float(interval.high)
        return cls(float(np.median(ratios)), low, high, float(ratios.min()))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"
