"""Running estimates with exponential decay, so that they follow changes."""

from math import inf
from typing import Self

DECAY = 0.95
"""Weight that an observation keeps when the next one is made."""
_PRIOR_TRIALS = 2.0
_PRIOR_VARIANCE = 0.5
_KNOWN_SPAN = 4
"""Distance of the points of a line known before: about that of measured ones, so that these outweigh them soon."""
_OUTLIER = 2.0
"""An observation counts at most as this many times what is expected, unless the one before was as large."""


class Share:
    """How often something happened; the ``prior`` counts as a few trials, beside ``trials`` made before.

    Args:
        prior: the share before anything is observed.
        trials: how many were made before, with the share ``prior``.
    """

    def __init__(self, prior: float = 0.0, trials: float = 0.0) -> None:
        self._prior = prior
        self._hits, self._trials = trials * prior, trials

    def __bool__(self) -> bool:
        return self._trials > 0

    def fade(self) -> None:
        """Reduce the weight of all trials so far."""
        self._hits *= DECAY
        self._trials *= DECAY

    def observe(self, hit: bool) -> None:
        """Add a trial."""
        self._hits += hit
        self._trials += 1

    def mean(self, prior: float | None = None) -> float:
        """The share; the prior (its own or this one) counts as ``_PRIOR_TRIALS`` trials."""
        start = self._prior if prior is None else prior
        return (self._hits + _PRIOR_TRIALS * start) / (self._trials + _PRIOR_TRIALS)


class OutlierLimit:
    """Limits single large observations: a pause lengthens one, a lasting change all that follow."""

    def __init__(self) -> None:
        self._before = 0.0

    def limited(self, observed: float, expected: float) -> float:
        """The observation, but at most ``_OUTLIER`` times what is ``expected``, or the observation before if larger.

        Args:
            observed: the observation.
            expected: from earlier ones; 0 where nothing is known, which sets no limit.
        """
        most, self._before = max(_OUTLIER * expected, self._before) if expected else inf, observed
        return min(observed, most)


class Ratio:
    """One sum over another, such as tokens over seconds."""

    def __init__(self) -> None:
        self.above = self.below = 0.0

    def fade(self, decay: float = DECAY) -> None:
        """Reduce the weight of everything so far."""
        self.above *= decay
        self.below *= decay

    def observe(self, above: float, below: float, decay: float = DECAY) -> None:
        """Add to both sums, after everything so far has lost weight."""
        self.fade(decay)
        self.above += above
        self.below += below

    def __bool__(self) -> bool:
        return self.below > 0

    @property
    def value(self) -> float:
        """The ratio; only after an observation."""
        return self.above / self.below


class SecondsPerToken(Ratio):
    """A ratio whose observations are limited, each per token."""

    def __init__(self) -> None:
        super().__init__()
        self._outliers = OutlierLimit()

    def observe(self, above: float, below: float, decay: float = DECAY) -> None:
        """Add seconds and tokens, more than 0, to both sums."""
        limited = self._outliers.limited(above / below, self.value if self else 0.0)
        super().observe(limited * below, below, decay)


class Line:
    """A regression line; its slope is never negative, and shrinks towards 0 where the points lie close together.

    Args:
        decay: weight that a point keeps when the next one is added.
    """

    def __init__(self, decay: float = DECAY) -> None:
        self._decay = decay
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    @classmethod
    def through(cls, intercept: float, slope: float) -> Self:
        """A line known before; it counts as two points."""
        line, half = cls(), _KNOWN_SPAN / 2
        rise = slope * (half**2 + _PRIOR_VARIANCE) / half  # undoes the shrinking
        middle = intercept + slope * half
        line.observe(0, middle - rise)
        line.observe(_KNOWN_SPAN, middle + rise)
        return line

    def __bool__(self) -> bool:
        return self._weight > 0

    def observe(self, x: float, y: float) -> None:
        """Add a point."""
        self._weight = self._decay * self._weight + 1
        self._x = self._decay * self._x + x
        self._y = self._decay * self._y + y
        self._xx = self._decay * self._xx + x * x
        self._xy = self._decay * self._xy + x * y

    def shift(self, rise: float) -> None:
        """Move all points up by ``rise``: what is added to every y has changed."""
        self._y += self._weight * rise
        self._xy += self._x * rise

    @property
    def slope(self) -> float:
        """How much y grows with x; 0 without a point."""
        if not self._weight:
            return 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x**2
        return max(0.0, self._xy / self._weight - mean_x * mean_y) / (variance + _PRIOR_VARIANCE)

    @property
    def intercept(self) -> float:
        """The value of y at x = 0, never negative; 0 without a point."""
        return max(0.0, (self._y - self.slope * self._x) / self._weight) if self._weight else 0.0
