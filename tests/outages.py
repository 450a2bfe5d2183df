"""Outages of the link between a device and a base station over models without weights, and what a user then sees."""

from collections.abc import Callable, Sequence
from typing import cast

from device.answers.answer import Answer, AnswerStream, Conversation, TextChunk
from device.session.session import Origin
from device.settings import DraftSettings, Timeouts
from device.text.tentative_text import Revision, TentativeText
from device.text.tokenizer import Tokenizer
from protocol.messages import Message
from tests.fakes import Table
from tests.link_pair import MemoryTransport, Station
from tests.number_service import NumberTokenizer
from tests.timed_pair import PairTimes, TimedPair

NEVER = float("inf")


class OutagePair(TimedPair):
    """A timed pair whose link loses everything during outages; after each there is a new connection.

    Attributes:
        outages: begin and end of each that has not ended, in seconds.
        lost: the messages that the device sent in them.
    """

    def __init__(
        self,
        target_table: Table,
        draft_table: Table,
        times: PairTimes,
        timeouts: Timeouts,
        outages: Sequence[tuple[float, float]] = (),
    ) -> None:
        self.outages = [*outages]
        self.lost: list[Message] = []
        super().__init__(target_table, draft_table, times, timeouts)

    def send(self, frame: bytes) -> None:
        self._end_outages()
        if self._is_out(self.now):
            self.lost.append(self.decode(frame))
        else:
            super().send(frame)

    def receive(self, timeout: float) -> bytes | None:
        frame = super().receive(timeout)
        self._end_outages()
        return frame

    def conversation(self, settings: DraftSettings) -> Conversation:
        tokenizer = cast(Tokenizer, NumberTokenizer())
        return Conversation(self.client, self.planners, self.model, tokenizer, settings)

    def _end_outages(self) -> None:
        """Notice the new connections, as a socket does when it is used."""
        lasting = [outage for outage in self.outages if outage[1] > self.now]
        self.connections += len(self.outages) - len(lasting)
        self.outages[:] = lasting

    def _schedule(self, sent: float, frame: bytes, at_station: bool = False) -> None:
        if not self._is_out(sent + self.times.round_trip / 2):
            super()._schedule(sent, frame, at_station)

    def _is_out(self, moment: float) -> bool:
        return any(begin <= moment < end for begin, end in self.outages)


class OutTransport(MemoryTransport):
    """Loses everything while ``is_out``; its clock runs while it waits.

    Attributes:
        sent: messages so far.
    """

    def __init__(self, station: Station, is_out: Callable[["OutTransport"], bool]) -> None:
        super().__init__(station)
        self.sent = 0
        self._is_out = is_out
        self._was_out = False

    def send(self, frame: bytes) -> None:
        self.sent += 1
        if not self._is_out(self):
            super().send(frame)

    def receive(self, timeout: float) -> bytes | None:
        if self._is_out(self):
            self._was_out = True
            self.now += timeout
            return None
        if self._was_out:
            self._was_out, self.connections = False, self.connections + 1
            return None
        return super().receive(timeout)


class Reader:
    """Reads an answer as a terminal shows it.

    Attributes:
        text: shown.
        revisions: of it.
        seen: the most unverified characters so far.
    """

    def __init__(self, stop_at: str = "") -> None:
        self.text = ""
        self.revisions: list[Revision] = []
        self.seen = 0
        self._tentative = TentativeText()
        self._stop_at = stop_at

    def read(self, stream: AnswerStream) -> Answer:
        for chunk in stream:
            self.show(chunk)
        return stream.answer

    def show(self, chunk: TextChunk) -> None:
        is_end = chunk.token is None and chunk.origin is Origin.UNVERIFIED
        self._revise("" if is_end else chunk.text, chunk.text if is_end else chunk.unverified)

    def show_unverified(self, chunk: TextChunk) -> bool:
        self._revise("", chunk.unverified)
        return bool(self._stop_at) and self._stop_at in self.text

    @property
    def replaced(self) -> int:
        """How many characters were replaced."""
        return sum(len(revision.replaced) for revision in self.revisions)

    def _revise(self, verified: str, unverified: str) -> None:
        revision = self._tentative.revise(verified, unverified)
        assert self.text.endswith(revision.replaced)
        self.text = self.text[: len(self.text) - len(revision.replaced)] + revision.text
        self.seen = max(self.seen, revision.unverified)
        self.revisions.append(revision)


def verified_ids(answer: Answer) -> list[int]:
    pairs = zip(answer.token_ids, answer.origins, strict=True)
    return [token_id for token_id, origin in pairs if origin is not Origin.UNVERIFIED]
