"""The queue from the I/O thread to the engine, bounded in length and in the bytes of each owner; owners take turns."""

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

Task: TypeAlias = Callable[[], None]
"""A call that the engine makes in its own thread."""

_MAX_TASKS = 20_000
_MAX_TASKS_OF_OWNER = 2_000
_OWN = ""
"""The owner of the base station's own tasks."""


@dataclass
class _Queue:
    """What an owner has queued."""

    tasks: deque[tuple[Task, int]] = field(default_factory=deque)
    nbytes: int = 0


class Inbox:
    """Tasks, those of an owner in the order they came; the owners take turns, so that none keeps others waiting.

    Args:
        max_bytes: of an owner's queued messages.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._queues: dict[str, _Queue] = {}  # in the order of their turns
        self._count = 0
        self._lock = threading.Lock()
        self._signals: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each task

    def put(self, task: Task, owner: str = _OWN, size: int = 0, always: bool = False) -> bool:
        """Queue a task that holds ``size`` bytes for an owner; whether there was room. Devices resend lost requests.

        There is room for one that comes ``always``. Without an owner it is the base station's own.
        """
        with self._lock:
            queued = self._queues.get(owner) or _Queue()
            is_full = self._count >= _MAX_TASKS or len(queued.tasks) >= _MAX_TASKS_OF_OWNER
            if not always and (is_full or (size and queued.nbytes + size > self._max_bytes)):
                return False
            self._queues[owner] = queued
            queued.tasks.append((task, size))
            queued.nbytes += size
            self._count += 1
        self._signals.put(None)
        return True

    def wake(self) -> None:
        """Make a waiting ``get`` return. Safe in a signal handler."""
        self._signals.put(None)

    def get(self, seconds: float) -> Task | None:
        """The next task, or None where none comes within ``seconds``."""
        try:
            if seconds:
                self._signals.get(timeout=seconds)
            else:
                self._signals.get_nowait()
        except queue.Empty:
            return None
        with self._lock:
            if not self._count:
                return None
            owner, queued = next(iter(self._queues.items()))
            task, size = queued.tasks.popleft()
            queued.nbytes -= size
            self._count -= 1
            del self._queues[owner]
            if queued.tasks:  # to the end of the turns
                self._queues[owner] = queued
        return task
