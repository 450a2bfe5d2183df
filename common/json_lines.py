"""Append JSON objects to a file, one per line; both ends record their rounds with it."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from protocol.errors import SettingsError

logger = logging.getLogger(__name__)


class JsonLinesFile:
    """A JSON-lines file.

    Args:
        path: the file; an existing one is extended.
        clock: seconds since 1970.

    Raises:
        SettingsError: the file cannot be written.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise SettingsError("record", str(path), f"a file that can be written ({error.strerror})") from error
        self._clock = clock

    def append(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append a line for each row, with the current ``time``. On failure, log the reason once and stop recording."""
        if self._file.closed:
            return
        now = {"time": self._clock()}
        try:
            self._file.writelines(json.dumps({**row, **now}) + "\n" for row in rows)
            self._file.flush()
        except OSError as error:
            logger.error("recording stopped: %s", error)  # noqa: TRY400 - the reason is one line
            self.close()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # the last lines may be lost
            self._file.close()
