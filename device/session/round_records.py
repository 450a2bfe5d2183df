"""The device's record of each round; the base station records the rest (``basestation/engine/pass_records.py``)."""

from dataclasses import asdict, dataclass
from typing import Self, TypeAlias

from common.json_lines import JsonLinesFile
from protocol.messages import Mode, Verdict


@dataclass(frozen=True, slots=True)
class Moment:
    """Clock in seconds, and the link's byte counters."""

    seconds: float
    uplink_bytes: int
    downlink_bytes: int


Moments: TypeAlias = tuple[Moment, Moment, Moment]


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One round, as the device measured it.

    ``device``, ``session`` and ``round`` identify it as in the base station's record.
    ``draft_len`` is the most tokens it could draft, ``drafted`` how many it did. Bytes
    are those of the link, resent frames included. ``reply_seconds`` is the time from
    the Draft to its Verdict, or from the previous Verdict where the target decodes alone.
    """

    device: str
    session: int
    round: int
    mode: Mode
    draft_len: int
    drafted: int
    accepted: int
    token_id: int
    draft_seconds: float
    reply_seconds: float
    uplink_bytes: int
    downlink_bytes: int

    @classmethod
    def of(cls, device: str, mode: Mode, verdict: Verdict, draft_len: int, drafted: int, moments: Moments) -> Self:
        """The record of a round whose Verdict arrived.

        Args:
            device: the device's name at the base station.
            mode: of the session.
            verdict: of the round.
            draft_len: most tokens that could be drafted.
            drafted: tokens that were.
            moments: before drafting, before sending, and when the Verdict arrived.
        """
        began, sent, received = moments
        return cls(
            device,
            verdict.session_id,
            verdict.round_id,
            mode,
            draft_len,
            drafted,
            accepted=verdict.accepted,
            token_id=verdict.token_id,
            draft_seconds=sent.seconds - began.seconds,
            reply_seconds=received.seconds - sent.seconds,
            uplink_bytes=received.uplink_bytes - began.uplink_bytes,
            downlink_bytes=received.downlink_bytes - began.downlink_bytes,
        )


class RoundRecordFile(JsonLinesFile):
    """A file of JSON lines, one for each round; ``time`` is when its Verdict arrived."""

    def write(self, record: RoundRecord) -> None:
        """Append a round."""
        self.append([asdict(record)])
