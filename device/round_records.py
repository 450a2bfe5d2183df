"""A line for every round, of what the device alone knows of it; the base station's has the rest."""

from dataclasses import asdict, dataclass
from typing import Self, TypeAlias

from common.json_lines import JsonLinesFile
from protocol.messages import Mode, Verdict


@dataclass(frozen=True, slots=True)
class Moment:
    """A clock, in seconds, and what the link has counted in bytes."""

    seconds: float
    uplink_bytes: int
    downlink_bytes: int


Moments: TypeAlias = tuple[Moment, Moment, Moment]


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One round, as the device saw it.

    ``device``, ``session`` and ``round`` name it as the base station's record does.
    ``draft_len`` is how many tokens it might have drafted, ``drafted`` how many it
    did. Bytes are those of the link, whatever was repeated included;
    ``reply_seconds`` passed from sending to the Verdict, or from the Verdict before
    where the target decodes alone.
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
        """A round whose Verdict came.

        Args:
            device: what the base station calls this one.
            mode: of the session.
            verdict: the round's.
            draft_len: how many tokens might have been drafted.
            drafted: how many were.
            moments: before drafting, before sending, and when the Verdict was there.
        """
        began, sent, judged = moments
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
            reply_seconds=judged.seconds - sent.seconds,
            uplink_bytes=judged.uplink_bytes - began.uplink_bytes,
            downlink_bytes=judged.downlink_bytes - began.downlink_bytes,
        )


class RoundRecordFile(JsonLinesFile):
    """A file of JSON lines that grows by one for every round; ``time`` is when its Verdict was there."""

    def write(self, record: RoundRecord) -> None:
        """Write down a round."""
        self.append([asdict(record)])
