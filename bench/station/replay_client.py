"""A client that replays recorded rounds as one device session, without a draft model."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Self

from bench.station.recording import Recording
from protocol.bundle import Manifest
from protocol.errors import FaultError
from protocol.messages import (
    PROTOCOL_VERSION,
    Decode,
    Draft,
    Extend,
    Fault,
    Hello,
    Message,
    Mode,
    Open,
    Opened,
    Sampling,
    Verdict,
    Welcome,
)


@dataclass(frozen=True)
class ReplayTiming:
    """Seconds to draft a token (None: as recorded), and the one-way delay of the link."""

    token_seconds: float | None = None
    delay_seconds: float = 0.0


@dataclass
class Score:
    """Committed, drafted and accepted tokens, the seconds of each round as seen by the device, and divergences."""

    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    diverged: int = 0
    rounds: list[float] = field(default_factory=list)

    @classmethod
    def sum(cls, scores: Iterable[Self]) -> Self:
        """The total of several clients."""
        total = cls()
        for one in scores:
            total.tokens += one.tokens
            total.drafted += one.drafted
            total.accepted += one.accepted
            total.diverged += one.diverged
            total.rounds += one.rounds
        return total


class ReplayClient:
    """One session that answers its prompt over and over.

    Rounding can make the target's answer diverge from the recorded one; the client
    then returns to the recorded answer with an Extend.

    Args:
        recording: what is replayed.
        mode: ``ids``, or ``target`` to let the target decode alone.
        timing: how long drafting and the link take.
        manifest: of the draft model.
        recompute_prompt: start every answer at the first token of the prompt, so that nothing is cached.
    """

    def __init__(
        self,
        recording: Recording,
        mode: Mode,
        timing: ReplayTiming,
        manifest: Manifest,
        recompute_prompt: bool = False,
    ) -> None:
        self.score = Score()
        self._start = 0 if recompute_prompt else len(recording.prompt_ids) - 1
        self._recording = recording
        self._mode = mode
        self._timing = timing
        self._hello = Hello(
            PROTOCOL_VERSION, manifest.vocab_size, bytes.fromhex(manifest.vocabulary_hash), manifest.stop_ids
        )
        self._round_id = 0
        self._committed = 0  # tokens of the recorded answer
        self._remaining = 0  # tokens of the current Decode
        self._sent_at = 0.0
        self._drafted: tuple[int, ...] = ()

    def first_message(self) -> Message:
        """The Hello."""
        return self._hello

    def mark_sent(self, now: float) -> None:
        """Note that the last message was sent; a device would have sent it a round trip earlier."""
        self._sent_at = now - 2 * self._timing.delay_seconds

    def reply_to(self, message: Message, now: float) -> tuple[float, Message] | None:
        """The seconds to wait and the next message; None if more messages are expected first.

        Raises:
            FaultError: the base station answered with a Fault.
        """
        match message:
            case Welcome():
                return 0.0, Open(0, 0, self._mode, Sampling(), self._recording.prompt_ids)
            case Opened():
                return self._request_round()
            case Verdict():
                return self._commit(message, now)
            case Fault():
                raise FaultError(message.code, message.text)
        return None

    def _request_round(self) -> tuple[float, Message]:
        self._round_id += 1
        recording, remaining = self._recording, len(self._recording.answer_ids) - self._committed
        link_seconds = 2 * self._timing.delay_seconds
        if self._mode is Mode.TARGET:
            self._remaining = remaining
            return link_seconds, Decode(0, self._round_id, remaining)
        self._drafted = recording.drafts[self._committed][: remaining - 1]
        self.score.drafted += len(self._drafted)
        token_seconds = self._timing.token_seconds
        token_seconds = recording.token_seconds if token_seconds is None else token_seconds
        return len(self._drafted) * token_seconds + link_seconds, Draft(0, self._round_id, self._drafted)

    def _commit(self, verdict: Verdict, now: float) -> tuple[float, Message] | None:
        self.score.rounds.append(now - self._sent_at)
        self.score.tokens += verdict.accepted + 1
        self.score.accepted += verdict.accepted
        answer = self._recording.answer_ids
        tokens = [*self._drafted[: verdict.accepted], verdict.token_id]
        recorded = answer[self._committed : self._committed + len(tokens)]
        equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, recorded, strict=True)))
        self._committed += min(equal + 1, len(tokens))
        if self._mode is Mode.TARGET:
            self._remaining, self._sent_at, self._round_id = self._remaining - 1, now, verdict.round_id
            if self._remaining and verdict.token_id not in self._hello.stop_ids:
                return None
            return self._restart()
        if self._committed == len(answer):
            return self._restart()
        if equal < len(tokens):
            self.score.diverged += 1
            return self._extend(len(self._recording.prompt_ids) + self._committed - 1, answer[self._committed - 1])
        return self._request_round()

    def _restart(self) -> tuple[float, Message]:
        """Start the answer again."""
        self._committed = 0
        return self._extend(self._start, *self._recording.prompt_ids[self._start :])

    def _extend(self, start: int, *token_ids: int) -> tuple[float, Message]:
        self._round_id += 1
        return 0.0, Extend(0, self._round_id, start, token_ids)
