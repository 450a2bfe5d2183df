"""Quarantine: a device whose handshakes precede the aborts of the front is kept out for a while.

libzmq ends its process when an enrolled device with hostile software claims the routing
id that a socket assigns next. The front tells its parent of each handshake before it
answers it; at an abort, the keys of the last few of them are suspected, and a key that
is suspected twice within a minute is quarantined.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping

_SUSPECT_HANDSHAKES = 3
_SUSPECT_SECONDS = 1.0
"""An attack is a handshake that ends the process at once, after an earlier one that claimed an id."""
_BETWEEN_ABORTS = 60.0
_QUARANTINE_SECONDS = 600.0


class HandshakeLog:
    """The front's end: writes handshakes down, and knows which keys are in quarantine.

    Args:
        write: tells the parent of a key that is about to be admitted.
        quarantined: until when which keys are refused, by the clock.
        clock: seconds, monotonic, the same in both processes.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        quarantined: Mapping[str, float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._quarantined = quarantined
        self._clock = clock

    def admit(self, key: str) -> bool:
        """Whether a key may connect; it is written down first."""
        if self._clock() < self._quarantined.get(key, -math.inf):
            return False
        self._write(key)
        return True


class Quarantine:
    """The parent's end: learns of handshakes and aborts.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._handshakes: deque[tuple[float, str]] = deque(maxlen=_SUSPECT_HANDSHAKES)
        self._suspected: dict[str, float] = {}
        self._until: dict[str, float] = {}

    def note_handshake(self, key: str) -> None:
        """A key is about to be admitted."""
        self._handshakes.append((self._clock(), key))

    def note_abort(self) -> list[str]:
        """The front was aborted; returns the keys that are quarantined from now on."""
        now = self._clock()
        last = self._handshakes[-1][0] if self._handshakes else now
        suspects = {key for at, key in self._handshakes if at >= last - _SUSPECT_SECONDS}
        again = sorted(key for key in suspects if now - self._suspected.get(key, float("-inf")) < _BETWEEN_ABORTS)
        self._suspected.update(dict.fromkeys(suspects, now))
        self._until.update(dict.fromkeys(again, now + _QUARANTINE_SECONDS))
        self._handshakes.clear()
        return again

    def deadlines(self) -> Mapping[str, float]:
        """The keys in quarantine now, and until when each is."""
        now = self._clock()
        return {key: until for key, until in self._until.items() if until > now}
