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
    JUDGING = "judging"
    DECODING = "decoding"
    EXTENDING = "extending"
    CLOSED = "closed"


TRANSITIONS: Mapping[tuple[State, type[SessionMessage]], State] = {
    (State.NEW, Open): State.OPENING,
    (State.OPENING, Opened): State.READY,
    (State.READY, Draft): State.JUDGING,
    (State.JUDGING, Verdict): State.READY,
    (State.READY, Decode): State.DECODING,
    (State.DECODING, Verdict): State.DECODING,  # READY with the last token: see _take_verdict
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

    Attributes:
        state: where the session stands.
        round_id: of the next request, or of the reply that is awaited.
        committed_len: tokens both ends agree on, the prompt included.
    """

    def __init__(self, stop_ids: frozenset[int]) -> None:
        self.state = State.NEW
        self.round_id = 0
        self.committed_len = 0
        self._stop_ids = stop_ids
        self._mode = Mode.TARGET
        self._draft_len = 0
        self._left = 0

    def is_old(self, message: Request | Reply) -> bool:
        """Whether a message belongs to a round that is over: a repetition, nothing to act upon."""
        return message.round_id < self.round_id

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
            if message.round_id != self.round_id:
                raise StateError(f"round {message.round_id} where {self.round_id} comes next")
            self._check(message)
        self.state = state
        self._take(message)

    def _check(self, message: Request | Reply) -> None:
        if isinstance(message, Draft):
            self._check_draft(message)
        elif isinstance(message, Verdict) and message.accepted > self._draft_len:
            raise StateError(f"{message.accepted} tokens accepted of {self._draft_len} drafted")
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

    def _take(self, message: SessionMessage) -> None:
        match message:
            case Open():
                self._mode = message.mode
                self.committed_len = len(message.prompt_ids)
            case Extend():
                self.committed_len = message.start + len(message.token_ids)
            case Draft():
                self._draft_len = len(message.token_ids)
            case Decode():
                self._draft_len, self._left = 0, message.count
            case Opened():
                self.round_id += 1
            case Verdict():
                self._take_verdict(message)

    def _take_verdict(self, verdict: Verdict) -> None:
        self.round_id += 1
        self.committed_len += verdict.accepted + 1
        if self.state is State.DECODING:
            self._left -= 1
            if self._left == 0 or verdict.token_id in self._stop_ids:
                self.state = State.READY
