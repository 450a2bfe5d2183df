"""Whether the target decodes alone, and when the other way is tried again.

Knows numbers of tokens; not what makes one way faster.
"""

MIN_WAIT = 64
"""Tokens at least until the slower way is tried again."""


class Trials:
    """Two ways, drafting and the target alone: the faster one goes on, the slower one is tried now and then.

    Attributes:
        alone: whether the target decodes alone.
        since: tokens since the slower way was last tried.
        wait: tokens after which it is tried again.
    """

    def __init__(self) -> None:
        self.start(alone=False, since=0, wait=MIN_WAIT)

    def start(self, alone: bool, since: int, wait: int) -> None:
        """Go on in this way, as an earlier process did."""
        self.alone, self.since, self.wait = alone, since, wait

    @property
    def due(self) -> bool:
        """Whether the slower way is to be tried now."""
        return self.since >= self.wait

    @property
    def left(self) -> int:
        """Tokens until then."""
        return self.wait - self.since

    def switch(self) -> None:
        """Go on in the other way, and try this one again soon."""
        self.start(not self.alone, since=0, wait=MIN_WAIT)

    def plan(self, lost: float, share: float) -> None:
        """Plan the next trial from now on.

        Args:
            lost: tokens that the faster way gives in the time of a trial, less those of the trial.
            share: largest share of all tokens that trials may lose.
        """
        self.since, self.wait = 0, max(MIN_WAIT, round(lost / share))
