"""A line for every round."""

import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from basestation.reports import PassReport

logger = logging.getLogger(__name__)


class Records:
    """A file of JSON lines that grows by one for every judged round.

    A line has the fields of ``RoundReport``, the time (seconds since 1970, when the
    Verdict was ready) and what the round shares with the others of its pass.

    Args:
        path: the file; lines are added to what is there.
        clock: seconds since 1970.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._clock = clock

    def keep(self, report: PassReport) -> None:
        """Write down the rounds of a pass; where that fails, say so once and stop."""
        if self._file.closed:
            return
        shared = {
            "time": self._clock(),
            "pass_sessions": report.sessions,
            "pass_tokens": report.tokens,
            "forward_seconds": report.forward_seconds,
            "verify_seconds": report.verify_seconds,
        }
        try:
            self._file.writelines(json.dumps({**asdict(one), **shared}) + "\n" for one in report.rounds)
            self._file.flush()
        except OSError as error:
            logger.error("no more rounds are recorded: %s", error)  # noqa: TRY400 - the reason is one line
            self.close()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # what could not be written is lost
            self._file.close()
