"""The guard on resident memory: what peers make ZeroMQ buffer is bounded by no option of a socket.

A message of endless parts, of which no part is delivered before the last, grows the
process without end, even from a peer without a key. So new connections are refused
when memory runs short, and the process ends before the system is out of memory: its
supervisor starts it again, and devices reopen their sessions.
"""

import logging
import time
from collections.abc import Callable

import psutil

from basestation.kv_cache.heap import return_free_memory
from basestation.sizes import readable_size
from common.container_memory import within_limits
from protocol.errors import OverloadError

logger = logging.getLogger(__name__)

_REFUSING_SHARE = 0.5
_FREE_SHARE = 0.9
_RETURN_SECONDS = 5.0


class MemoryGuard:
    """Compares the resident memory of this process with what it may be.

    Args:
        expected: bytes that are resident when all KV caches are full and no peer is connected.
        for_peers: bytes beyond that for peers and for the tensors of a forward pass.
        resident: the bytes that are resident now.

    Attributes:
        accepting: whether new connections may be accepted.
    """

    def __init__(self, expected: int, for_peers: int, resident: Callable[[], int] | None = None) -> None:
        self._most = expected + for_peers
        self._refusing = self._most - int(for_peers * (1 - _REFUSING_SHARE))
        self._resident = resident or _resident_bytes
        self.accepting = True
        self._next_return = 0.0

    @classmethod
    def of_process(cls, kv_bytes: int, for_peers: int) -> "MemoryGuard":
        """A guard for this process, with the model loaded and up to ``kv_bytes`` of KV caches to come."""
        free = int(within_limits(psutil.virtual_memory().available) * _FREE_SHARE)
        return cls(_resident_bytes() + min(kv_bytes, max(0, free - for_peers)), for_peers)

    def check(self) -> None:
        """Compare now, note whether new connections may be accepted, and return free memory to the system sometimes.

        Raises:
            OverloadError: the process must end.
        """
        if time.monotonic() >= self._next_return:
            self._next_return = time.monotonic() + _RETURN_SECONDS
            return_free_memory()
        resident = self._resident()
        if resident > self._most:
            raise OverloadError(
                f"{readable_size(resident)} of memory are resident; allowed: {readable_size(self._most)}, which is "
                "the model, the KV caches and --peer-memory; peers hold the rest, so start the base station again"
            )
        accepting = resident <= self._refusing
        if accepting != self.accepting:
            self.accepting = accepting
            state = "accepting new connections again" if accepting else "refusing new connections"
            logger.warning("%s of memory are resident: %s", readable_size(resident), state)


def _resident_bytes() -> int:
    """Without files that are mapped: the system takes their pages back when memory is short."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))
