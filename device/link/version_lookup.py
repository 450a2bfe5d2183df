"""The IP version that a base station's host needs, looked up in a thread: name resolution has no timeout."""

import threading
import time
from contextlib import suppress

from device.link.probe import needs_ipv6
from protocol.errors import EdgedraftError

_INTERVAL = 2.0


class VersionLookup:
    """Whether a host needs IPv6, which may change while there is no connection to it.

    Args:
        address: of the base station.
        ipv6: what is known so far.
    """

    def __init__(self, address: str, ipv6: bool) -> None:
        self._address = address
        self._ipv6 = ipv6
        self._thread: threading.Thread | None = None
        self._next = time.monotonic() + _INTERVAL

    def needs_ipv6(self) -> bool:
        """What the last lookup that succeeded found; starts another one every ``_INTERVAL`` seconds."""
        if time.monotonic() >= self._next and not (self._thread and self._thread.is_alive()):
            self._next = time.monotonic() + _INTERVAL
            self._thread = threading.Thread(target=self._look_up, name="lookup", daemon=True)
            self._thread.start()
        return self._ipv6

    def _look_up(self) -> None:
        with suppress(EdgedraftError):  # the name does not resolve
            self._ipv6 = needs_ipv6(self._address)
