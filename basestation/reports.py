"""What a pass did, for those who count and those who keep records."""

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.messages import Mode


@dataclass(frozen=True, slots=True)
class RoundReport:
    """One judged round; ``queue_seconds`` passed from when it could have been run until it was."""

    device: str
    session: int
    round: int
    mode: Mode
    drafted: int
    accepted: int
    token_id: int
    queue_seconds: float


@dataclass(frozen=True, slots=True)
class PassReport:
    """One pass: ``tokens`` of ``sessions`` were run, and those rounds judged."""

    sessions: int
    tokens: int
    forward_seconds: float
    verify_seconds: float
    rounds: Sequence[RoundReport]
