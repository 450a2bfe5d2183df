"""What may follow what in a session: a state machine that both ends keep, without I/O.

Each end passes every message of the session, sent or received, through its own
``SessionRounds``; the two machines then agree on the state, on the next round
and on how many tokens are committed. The transition table is data, and the
diagram of docs/protocol.md follows it.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeAlias

from protocol.errors import StateError
from protocol.messages import Close, Decode, Draft, Extend, Fault, Mode, Open, Opened, Reply, Request, Verdict

SessionMessage: TypeAlias = Request | Reply | Close | Fault


class State(StrEnum):
    """Where a session stands."""

    NEW = "new"
    OPENING = "opening"
    READY = "ready"
    VERIFYING = "judging"
    DECODING = "decoding"
    EXTENDING = "extending"
    CLOSED = "closed"


TRANSITIONS: Mapping[tuple[State, type[SessionMessage]], State] = {
    (State.NEW, Open): State.OPENING,
    (State.OPENING, Opened): State.READY,
    (State.READY, Draft): State.VERIFYING,
    (State.VERIFYING, Draft): State.VERIFYING,
    (State.VERIFYING, Verdict): State.READY,  # VERIFYING while another Draft is under way: see _take_verdict
    (State.READY, Decode): State.DECODING,
    (State.DECODING, Verdict): State.DECODING,  # READY with the last token: see _take_decoded
    (State.READY, Extend): State.EXTENDING,
    (State.EXTENDING, Opened): State.READY,
    **{(state, end): State.CLOSED for state in State if state is not State.CLOSED for end in (Close, Fault)},
}


def diagram() -> str:
    """The transition table as a Mermaid state diagram, one arrow a row, as docs/protocol.md shows it."""
    arrows = [f"    {origin} --> {goal}: {kind.__name__}" for (origin, kind), goal in TRANSITIONS.items()]
    return "\n".join(["stateDiagram-v2", *sorted(arrows)])


class SessionRounds:
    """One end's view of a session.

    Several Drafts may be under way, each but the first on a assumed_bonus. Where a Verdict
    shows a assumed_bonus to be wrong, that Draft and all after it are void on both ends:
    nobody judges or answers them, and their rounds are skipped.

    Args:
        stop_ids: the ids that end a Decode.
        window: how many Drafts may be under way.

    Attributes:
        state: where the session stands.
        next_round: ``round_id`` of the next request.
        committed_len: tokens both ends agree on, the prompt included.
        in_flight: the Drafts that wait for their Verdicts, the oldest first.
    """

    def __init__(self, stop_ids: frozenset[int], window: int = 1) -> None:
        self.state = State.NEW
        self.next_round = 0
        self.committed_len = 0
        self.in_flight: tuple[Draft, ...] = ()
        self._stop_ids = stop_ids
        self._window = window
        self._mode = Mode.TARGET
        self._awaited: int | None = None
        self._left = 0
        self._base_round: tuple[int, int] | None = None

    @property
    def round_id(self) -> int:
        """Of the reply that is awaited, or of the next request."""
        return self.next_round if self._awaited is None else self._awaited

    def is_old(self, request: Request) -> bool:
        """Whether a request belongs to a round that is over or under way: a repetition, nothing to act upon."""
        return request.round_id < self.next_round

    def is_invalidated(self, draft: Draft) -> bool:
        """Whether a Draft builds on a wrong assumed_bonus, or on one that has not arrived."""
        if draft.assumed_bonus is None:
            return False
        if self.in_flight:
            return draft.round_id != self.in_flight[-1].round_id + 1
        return self._base_round != (draft.round_id - 1, draft.assumed_bonus)

    def advance(self, message: SessionMessage) -> None:
        """Take one message, sent or received.

        Raises:
            StateError: it may not follow what came before; the machine is unchanged.
        """
        state = TRANSITIONS.get((self.state, type(message)))
        if state is None:
            allowed = [kind.__name__ for origin, kind in TRANSITIONS if origin is self.state]
            raise StateError(
                f"{type(message).__name__} in a session that is {self.state}; "
                f"allowed: {', '.join(allowed) or 'nothing'}"
            )
        if not isinstance(message, Close | Fault):
            self._check_round(message)
            self._check(message)
        self.state = state
        self._take(message)

    def _check_round(self, message: Request | Reply) -> None:
        """A reply is the awaited one. A request is the next, or behind void Drafts that got lost."""
        ahead = 0
        if isinstance(message, Opened | Verdict):
            expected = self.round_id
        else:
            expected, ahead = self.next_round, self._window - 1 if self.state is State.READY else 0
        if not expected <= message.round_id <= expected + ahead:
            raise StateError(f"round {message.round_id} where {expected} comes next")

    def _check(self, message: Request | Reply) -> None:
        if isinstance(message, Draft):
            self._check_draft(message)
        elif isinstance(message, Verdict) and message.accepted > self._drafted:
            raise StateError(f"{message.accepted} tokens accepted of {self._drafted} drafted")
        elif isinstance(message, Decode) and message.count == 0:
            raise StateError("a Decode of 0 tokens; allowed: 1 or more")
        elif isinstance(message, Open):
            self._check_open(message)
        elif isinstance(message, Extend) and not (0 <= message.start <= self.committed_len and message.token_ids):
            raise StateError(
                f"an Extend of {len(message.token_ids)} tokens after the first {message.start}; "
                f"allowed: 1 or more, after at most {self.committed_len}"
            )

    @staticmethod
    def _check_open(message: Open) -> None:
        if not message.prompt_ids:
            raise StateError("an Open without a prompt; allowed: 1 token or more")
        if message.mode is Mode.IDS and not message.sampling.greedy:
            raise StateError(f"mode 'ids' at temperature {message.sampling.temperature}; allowed: temperature 0")

    def _check_draft(self, draft: Draft) -> None:
        if self._mode is Mode.TARGET and draft.token_ids:
            raise StateError("a Draft with tokens in mode 'target', in which the target decodes alone")
        if draft.token_ids and self._mode.sends_ids_alone == bool(draft.distributions):
            kind = "with" if draft.distributions else "without"
            raise StateError(f"a Draft {kind} distributions in mode {self._mode.value!r}")
        if self.is_invalidated(draft):
            raise StateError(f"a Draft on the assumed_bonus {draft.assumed_bonus}, which is void")
        if self.in_flight and draft.assumed_bonus is None:
            raise StateError("a Draft without a assumed_bonus while another is under way")
        if len(self.in_flight) >= self._window:
            raise StateError(f"{len(self.in_flight) + 1} Drafts under way; allowed: {self._window} (--window)")

    @property
    def _drafted(self) -> int:
        """Tokens of the Draft whose Verdict is awaited; 0 in a Decode."""
        return len(self.in_flight[0].token_ids) if self.in_flight else 0

    def _take(self, message: SessionMessage) -> None:
        match message:
            case Open():
                self._mode = message.mode
                self.committed_len = len(message.prompt_ids)
            case Extend():
                self.committed_len = message.start + len(message.token_ids)
            case Draft():
                self.in_flight += (message,)
            case Decode():
                self._left = message.count
            case Opened():
                self._awaited = None
            case Verdict():
                self._take_verdict(message)
        if isinstance(message, Open | Extend | Draft | Decode):
            self.next_round = message.round_id + 1
            self._awaited = self.in_flight[0].round_id if self.in_flight else message.round_id

    def _take_verdict(self, verdict: Verdict) -> None:
        self.committed_len += verdict.accepted + 1
        all_stand = verdict.accepted == self._drafted
        self._base_round = (verdict.round_id, verdict.token_id) if all_stand else None
        if self.state is State.DECODING:
            self._take_decoded(verdict)
            return
        self.in_flight = self.in_flight[1:]
        if self.in_flight and self._base_round == (verdict.round_id, self.in_flight[0].assumed_bonus):
            self.state = State.VERIFYING
            self._awaited = self.in_flight[0].round_id
        else:
            self.in_flight = ()
            self._awaited = None

    def _take_decoded(self, verdict: Verdict) -> None:
        self.next_round = verdict.round_id + 1
        self._left -= 1
        self._awaited = self.next_round
        if self._left == 0 or verdict.token_id in self._stop_ids:
            self.state = State.READY
            self._awaited = None
