"""How much a device may ask for in a second, seen before anything is decoded."""

import time
from collections.abc import Callable
from dataclasses import dataclass

_BURST_SECONDS = 4.0
_TELL_SECONDS = 1.0
_MAX_SENDERS = 10_000


@dataclass
class _Sender:
    """What a sender may still send at the time ``seen``, and when it was last told that it may not."""

    left: float
    seen: float
    told: float = float("-inf")


class RateLimiter:
    """A token bucket for each sender, filled ``per_second`` and holding some seconds' worth.

    Args:
        per_second: messages of one sender.
        clock: seconds, monotonic.
    """

    def __init__(self, per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._senders: dict[str, _Sender] = {}

    def allows(self, name: str) -> bool:
        """Take note of a message; whether it is within bounds."""
        now, full = self._clock(), self._per_second * _BURST_SECONDS
        sender = self._senders.pop(name, None) or _Sender(full, now)
        sender.left = min(full, sender.left + (now - sender.seen) * self._per_second)
        sender.seen = now
        self._senders[name] = sender
        if len(self._senders) > _MAX_SENDERS:
            del self._senders[next(iter(self._senders))]
        if sender.left < 1:
            return False
        sender.left -= 1
        return True

    def should_notify(self, name: str) -> bool:
        """Whether a sender that is not allowed is to be told so: not more than once a second."""
        sender = self._senders[name]
        if self._clock() - sender.told < _TELL_SECONDS:
            return False
        sender.told = self._clock()
        return True
