"""A line for every judged round."""

from dataclasses import asdict

from basestation.reports import PassReport
from protocol.records import RecordFile


class Records(RecordFile):
    """A file of JSON lines that grows by one for every judged round.

    A line has the fields of ``RoundReport``, the time (seconds since 1970, when the
    Verdict was ready) and what the round shares with the others of its pass.
    """

    def keep(self, report: PassReport) -> None:
        """Write down the rounds of a pass."""
        shared = {
            "pass_sessions": report.sessions,
            "pass_tokens": report.tokens,
            "forward_seconds": report.forward_seconds,
            "verify_seconds": report.verify_seconds,
        }
        self.add({**asdict(one), **shared} for one in report.rounds)
