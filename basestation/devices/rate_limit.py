"""Rate limits of each device, applied before a message costs much."""

import time
from collections.abc import Callable
from dataclasses import dataclass

_BURST_SECONDS = 4.0
_NOTIFY_SECONDS = 1.0
_MAX_SENDERS = 10_000


@dataclass
class _Sender:
    """A token bucket: ``tokens`` at the time ``updated``, and when its sender was last notified of the limit."""

    tokens: float
    updated: float
    notified: float = float("-inf")


class RateLimiter:
    """A token bucket per sender, filled at ``per_second``, with a capacity of ``_BURST_SECONDS``.

    Args:
        per_second: messages, bytes or replies per sender.
        clock: seconds, monotonic.

    Attributes:
        capacity: most that a sender may be charged at once.
    """

    def __init__(self, per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self.capacity = per_second * _BURST_SECONDS
        self._clock = clock
        self._senders: dict[str, _Sender] = {}

    def allows(self, name: str, cost: int = 1) -> bool:
        """Charge ``cost`` to a sender if that is within the limit; whether it is."""
        sender = self._filled(name)
        if sender.tokens < cost:
            return False
        sender.tokens -= cost
        return True

    def left(self, name: str) -> int:
        """How much a sender may be charged now."""
        return int(self._filled(name).tokens)

    def should_notify(self, name: str) -> bool:
        """Whether to notify a sender that exceeded the limit: at most once a second."""
        sender = self._senders[name]
        if self._clock() - sender.notified < _NOTIFY_SECONDS:
            return False
        sender.notified = self._clock()
        return True

    def _filled(self, name: str) -> _Sender:
        now = self._clock()
        sender = self._senders.pop(name, None) or _Sender(self.capacity, now)
        sender.tokens = min(self.capacity, sender.tokens + (now - sender.updated) * self._per_second)
        sender.updated = now
        self._senders[name] = sender
        if len(self._senders) > _MAX_SENDERS:
            del self._senders[next(iter(self._senders))]
        return sender
