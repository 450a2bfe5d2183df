"""A file to which both ends may write down their rounds, each round a JSON object in a line of its own."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)


class RecordFile:
    """A file of JSON lines that grows.

    Args:
        path: the file; lines are added to what is there.
        clock: seconds since 1970.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._clock = clock

    def add(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Write a line for each row, with the ``time``; where that fails, say so once and stop."""
        if self._file.closed:
            return
        now = {"time": self._clock()}
        try:
            self._file.writelines(json.dumps({**row, **now}) + "\n" for row in rows)
            self._file.flush()
        except OSError as error:
            logger.error("no more rounds are recorded: %s", error)  # noqa: TRY400 - the reason is one line
            self.close()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # what could not be written is lost
            self._file.close()
