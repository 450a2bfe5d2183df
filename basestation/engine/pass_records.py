"""Records of forward passes: the metrics count them, and the record file gets a line for each verified round."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from common.json_lines import JsonLinesFile
from protocol.messages import Mode


@dataclass(frozen=True, slots=True)
class VerifiedRound:
    """One verified round.

    ``queueing_delay`` is the time in seconds from the request being ready to the start of its forward pass.
    """

    device: str
    session: int
    round: int
    mode: Mode
    drafted: int
    accepted: int
    token_id: int
    queueing_delay: float


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One forward pass over ``tokens`` of ``sessions``, which verified ``rounds``.

    It copied the KV cache of ``gathered`` sessions, whose pages were not one run.
    """

    sessions: int
    tokens: int
    gathered: int
    forward_seconds: float
    verify_seconds: float
    rounds: Sequence[VerifiedRound]


class PassRecordFile(JsonLinesFile):
    """A file of JSON lines, one for each verified round.

    A line has the fields of ``VerifiedRound``, the ``time`` (seconds since 1970, when
    the Verdict was ready) and the size and times of the round's forward pass.
    """

    def write(self, record: PassRecord) -> None:
        """Append a line for each round of a pass."""
        shared = {
            "batch_sessions": record.sessions,
            "batch_tokens": record.tokens,
            "forward_seconds": record.forward_seconds,
            "verify_seconds": record.verify_seconds,
        }
        self.append({**asdict(one), **shared} for one in record.rounds)
