"""The requests that wait for the worker, in order of arrival; an abandoned one gives up its place at once.

One whose prompt is still being encoded is overtaken by those behind it.
"""

import threading
from collections import deque
from collections.abc import Callable

from device.answers.job import Finish, Job
from protocol.errors import BusyError, ClosingError

_MAX_WAITING = 16


class JobQueue:
    """Jobs from any thread for one worker.

    Args:
        on_abandoned: called for each job whose client leaves while it waits.
    """

    def __init__(self, on_abandoned: Callable[[], None]) -> None:
        self._on_abandoned = on_abandoned
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._taken: Job | None = None
        self._closed: str | None = None

    def put(self, job: Job) -> None:
        """Append a job.

        Raises:
            BusyError: ``_MAX_WAITING`` jobs are waiting, and it is the first of its request.
            ClosingError: the queue is closed.
        """
        with self._changed:
            if self._closed is not None:
                raise ClosingError(self._closed)
            self._drop_cancelled()
            if job.is_first and len(self._jobs) >= _MAX_WAITING:
                raise BusyError(f"{_MAX_WAITING} requests are waiting already; retry later")
            self._jobs.append(job)
            self._changed.notify()

    def get(self, seconds: float) -> Job | None:
        """Remove and return the oldest job whose prompt is encoded.

        Returns:
            None if there is none within ``seconds``, or the queue is closed.
        """
        with self._changed:
            self._taken = None
            self._changed.wait_for(lambda: self._first() or self._closed is not None, seconds)
            self._taken = self._first()
            if self._taken:
                self._jobs.remove(self._taken)
            return self._taken

    def finish(self, job: Job, outcome: Finish | Exception) -> None:
        """Deliver the outcome of the job that was taken last, unless ``close`` has refused it."""
        with self._changed:
            is_open, self._taken = self._taken is job, None
        if is_open:
            job.deliver(outcome)

    def note_encoded(self) -> None:
        """Look again for a job whose prompt is encoded."""
        with self._changed:
            self._changed.notify()

    def __len__(self) -> int:
        """Requests whose clients wait. Any thread may call it."""
        with self._changed:
            self._drop_cancelled()
            return len(self._jobs)

    def close(self, reason: str) -> None:
        """Refuse the waiting jobs, the one that was taken last, and all later ones."""
        with self._changed:
            self._closed = reason
            jobs, self._jobs = [*self._jobs], deque()
            if self._taken is not None:  # its answer may take a while to end, and deliver some text until then
                jobs.append(self._taken)
                self._taken = None
            self._changed.notify()
        for job in jobs:
            job.deliver(ClosingError(reason))

    def _first(self) -> Job | None:
        """The oldest job that can be answered now."""
        self._drop_cancelled()
        return next((job for job in self._jobs if job.prompt_ids.done()), None)

    def _drop_cancelled(self) -> None:
        waiting = deque(job for job in self._jobs if not job.cancelled.is_set())
        for _ in range(len(self._jobs) - len(waiting)):
            self._on_abandoned()
        self._jobs = waiting
