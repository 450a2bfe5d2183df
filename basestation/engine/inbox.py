"""The queue from the I/O thread to the engine, bounded in length and in the bytes of each owner."""

import collections
import queue
import threading
from collections.abc import Callable
from typing import TypeAlias

Task: TypeAlias = Callable[[], None]
"""A call that the engine makes in its own thread."""

_MAX_TASKS = 20_000


class Inbox:
    """Tasks in the order they came.

    Args:
        max_bytes: of an owner's queued messages.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._tasks: queue.SimpleQueue[tuple[Task, str, int]] = queue.SimpleQueue()
        self._queued: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def put(self, task: Task, owner: str = "", size: int = 0) -> bool:
        """Queue a task that holds ``size`` bytes for an owner; whether there was room. Devices resend lost requests."""
        with self._lock:
            if self._tasks.qsize() >= _MAX_TASKS or (size and self._queued[owner] + size > self._max_bytes):
                return False
            if size:
                self._queued[owner] += size
        self._tasks.put((task, owner, size))
        return True

    def wake(self) -> None:
        """Make a waiting ``get`` return. Safe in a signal handler."""
        self._tasks.put((_do_nothing, "", 0))

    def get(self, seconds: float) -> Task | None:
        """The next task, or None where none comes within ``seconds``."""
        try:
            task, owner, size = self._tasks.get(timeout=seconds) if seconds else self._tasks.get_nowait()
        except queue.Empty:
            return None
        if size:
            self._release(owner, size)
        return task

    def _release(self, owner: str, size: int) -> None:
        with self._lock:
            self._queued[owner] -= size
            if not self._queued[owner]:
                del self._queued[owner]


def _do_nothing() -> None:
    pass
