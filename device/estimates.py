"""Running estimates: what was seen fades, so that they follow what changes."""

KEPT = 0.95
"""What an observation counts for once another has come."""
_PRIOR_TRIALS = 2.0
_PRIOR_SPREAD = 0.5


class Share:
    """How often something happened; ``start`` counts as a few trials."""

    def __init__(self, start: float = 0.0) -> None:
        self._start = start
        self._hits = self._trials = 0.0

    def fade(self) -> None:
        """Make all trials so far count a little less."""
        self._hits *= KEPT
        self._trials *= KEPT

    def observe(self, hit: bool) -> None:
        """Take a trial."""
        self._hits += hit
        self._trials += 1

    def mean(self, start: float | None = None) -> float:
        """The share, its start (or another) counting as ``_PRIOR_TRIALS``."""
        begin = self._start if start is None else start
        return (self._hits + _PRIOR_TRIALS * begin) / (self._trials + _PRIOR_TRIALS)


class Ratio:
    """One sum over another, as of tokens over seconds."""

    def __init__(self) -> None:
        self.above = self.below = 0.0

    def fade(self, kept: float = KEPT) -> None:
        """Make all so far count less."""
        self.above *= kept
        self.below *= kept

    def observe(self, above: float, below: float) -> None:
        """Add to both sums."""
        self.fade()
        self.above += above
        self.below += below

    def __bool__(self) -> bool:
        return self.below > 0

    @property
    def value(self) -> float:
        """The ratio, of what was observed."""
        return self.above / self.below


class Line:
    """A line through points; its slope is never negative, and nears 0 where they lie close together."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, x: float, y: float) -> None:
        """Take a point."""
        self._weight = KEPT * self._weight + 1
        self._x = KEPT * self._x + x
        self._y = KEPT * self._y + y
        self._xx = KEPT * self._xx + x * x
        self._xy = KEPT * self._xy + x * y

    def shift(self, rise: float) -> None:
        """Move all points so far up or down: what is added to every y has changed."""
        self._y += self._weight * rise
        self._xy += self._x * rise

    @property
    def slope(self) -> float:
        """How much y grows with x; 0 without a point."""
        if not self._weight:
            return 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x**2
        return max(0.0, self._xy / self._weight - mean_x * mean_y) / (spread + _PRIOR_SPREAD)

    @property
    def intercept(self) -> float:
        """What y is where x is 0, never negative; 0 without a point."""
        return max(0.0, (self._y - self.slope * self._x) / self._weight) if self._weight else 0.0
