"""The state machine of a session, kept by both ends, without I/O.

Each end passes every message of the session, sent or received, through its own
``SessionRounds``. Both machines then agree on the state, the next round and the
number of committed tokens. The transition table is data; the diagram in
docs/protocol.md is generated from it.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeAlias

from protocol.errors import StateError
from protocol.messages import Close, Decode, Draft, Extend, Fault, Mode, Open, Opened, Reply, Request, Sampling, Verdict

SessionMessage: TypeAlias = Request | Reply | Close | Fault


class State(StrEnum):
    """The state of a session."""

    NEW = "new"
    OPENING = "opening"
    READY = "ready"
    VERIFYING = "verifying"
    DECODING = "decoding"
    EXTENDING = "extending"
    CLOSED = "closed"


TRANSITIONS: Mapping[tuple[State, type[SessionMessage]], State] = {
    (State.NEW, Open): State.OPENING,
    (State.OPENING, Opened): State.READY,
    (State.READY, Draft): State.VERIFYING,
    (State.VERIFYING, Draft): State.VERIFYING,
    (State.VERIFYING, Verdict): State.READY,  # VERIFYING while another Draft is in flight: see _take_verdict
    (State.READY, Decode): State.DECODING,
    (State.DECODING, Verdict): State.DECODING,  # READY with the last token: see _take_decoded
    (State.READY, Extend): State.EXTENDING,
    (State.EXTENDING, Opened): State.READY,
    **{(state, end): State.CLOSED for state in State if state is not State.CLOSED for end in (Close, Fault)},
}


def diagram() -> str:
    """The transition table as the Mermaid state diagram of docs/protocol.md, one arrow per transition."""
    arrows = [f"    {origin} --> {goal}: {kind.__name__}" for (origin, kind), goal in TRANSITIONS.items()]
    return "\n".join(["stateDiagram-v2", *sorted(arrows)])


class SessionRounds:
    """One end's view of a session.

    Several Drafts may be in flight, each except the first with an assumed bonus token.
    If a Verdict shows an assumed bonus token to be wrong, its Draft and all later ones
    are invalidated on both ends: they are neither verified nor answered, and their
    rounds are skipped.

    Args:
        stop_ids: the model's; with those of the sampling settings they end a Decode.
        window: the maximum number of Drafts in flight.

    Attributes:
        state: the state of the session.
        window: as given.
        next_round: least ``round_id`` of the next request.
        committed_len: the number of committed tokens, the prompt included.
        in_flight: the Drafts without a Verdict, oldest first.
    """

    def __init__(self, stop_ids: frozenset[int], window: int = 1) -> None:
        self.state = State.NEW
        self.next_round = 0
        self.committed_len = 0
        self.in_flight: tuple[Draft, ...] = ()
        self._model_stop_ids = self._stop_ids = stop_ids
        self.window = window
        self._mode = Mode.TARGET
        self._awaited: int | None = None
        self._left = 0
        self._base_round: tuple[int, int] | None = None

    @property
    def round_id(self) -> int:
        """The round of the awaited reply, or of the next request."""
        return self.next_round if self._awaited is None else self._awaited

    @property
    def left(self) -> int:
        """Verdicts of a Decode that are still due."""
        return self._left if self.state is State.DECODING else 0

    def is_old(self, request: Request) -> bool:
        """Whether the round of a request is complete or in flight, so that the request is a repetition."""
        return request.round_id < self.next_round

    def is_invalidated(self, draft: Draft) -> bool:
        """Whether a Draft has a wrong assumed bonus token, or builds on a round that has not arrived."""
        if draft.assumed_bonus is None:
            return False
        if self.in_flight:
            return draft.round_id != self.in_flight[-1].round_id + 1
        return self._base_round != (draft.round_id - 1, draft.assumed_bonus)

    def advance(self, message: SessionMessage) -> None:
        """Process one message, sent or received.

        Raises:
            StateError: the message is not allowed in this state; the machine is unchanged.
        """
        state = TRANSITIONS.get((self.state, type(message)))
        if state is None:
            allowed = [kind.__name__ for origin, kind in TRANSITIONS if origin is self.state]
            raise StateError(
                f"{type(message).__name__} in state {self.state}; allowed: {', '.join(allowed) or 'nothing'}"
            )
        if not isinstance(message, Close | Fault):
            self._check_round(message)
            self._check(message)
        self.state = state
        self._take(message)

    def _check_round(self, message: Request | Reply) -> None:
        """A reply has the awaited round. A request has the next round, or a later one after lost invalidated Drafts."""
        ahead = 0
        if isinstance(message, Opened | Verdict):
            expected = self.round_id
        else:
            expected, ahead = self.next_round, self.window - 1 if self.state is State.READY else 0
        if not expected <= message.round_id <= expected + ahead:
            raise StateError(f"round {message.round_id}; expected round {expected}")

    def _check(self, message: Request | Reply) -> None:
        if isinstance(message, Draft):
            self._check_draft(message)
        elif isinstance(message, Verdict) and message.accepted > self._drafted:
            raise StateError(f"{message.accepted} tokens accepted of {self._drafted} drafted")
        elif isinstance(message, Verdict) and message.logprobs and len(message.logprobs) != message.accepted + 1:
            raise StateError(f"log-probabilities of {len(message.logprobs)} tokens of {message.accepted + 1}")
        elif isinstance(message, Decode) and message.count == 0:
            raise StateError("a Decode of 0 tokens; allowed: 1 or more")
        elif isinstance(message, Open):
            self._check_open(message)
        elif isinstance(message, Extend):
            self._check_extend(message)

    @staticmethod
    def _check_open(message: Open) -> None:
        if not message.prompt_ids:
            raise StateError("an Open without a prompt; allowed: 1 token or more")
        if message.answer_len >= len(message.prompt_ids):
            raise StateError(
                f"an answer of {message.answer_len} tokens in {len(message.prompt_ids)}; allowed: fewer tokens than all"
            )
        _check_sampling(message.mode, message.sampling)

    def _check_extend(self, message: Extend) -> None:
        if not (0 <= message.start <= self.committed_len and message.token_ids):
            raise StateError(
                f"an Extend of {len(message.token_ids)} tokens after the first {message.start}; "
                f"allowed: 1 or more, after at most {self.committed_len}"
            )
        if message.sampling is not None:
            _check_sampling(self._mode, message.sampling)

    def _check_draft(self, draft: Draft) -> None:
        if draft.given:
            self._check_given(draft)
        elif self._mode is Mode.TARGET and draft.token_ids:
            raise StateError("a Draft with tokens in mode 'target'; allowed: none")
        elif draft.token_ids and self._mode.sends_ids_alone == bool(draft.distributions):
            kind = "with" if draft.distributions else "without"
            raise StateError(f"a Draft {kind} distributions in mode {self._mode.value!r}")
        if self.is_invalidated(draft):
            raise StateError(f"an invalidated Draft: its assumed bonus token {draft.assumed_bonus} is wrong")
        if self.in_flight and draft.assumed_bonus is None:
            raise StateError("a Draft without an assumed bonus token while another is in flight")
        if len(self.in_flight) >= self.window:
            raise StateError(f"{len(self.in_flight) + 1} Drafts in flight; allowed: {self.window} (--window)")

    def _check_given(self, draft: Draft) -> None:
        if self._mode is not Mode.TARGET or not draft.token_ids or self.in_flight:
            raise StateError(
                f"a Draft of {len(draft.token_ids)} given tokens in mode {self._mode.value!r}, "
                f"{len(self.in_flight)} others in flight; allowed: 1 or more in mode 'target', none in flight"
            )

    @property
    def _drafted(self) -> int:
        """The number of tokens in the oldest Draft in flight; 0 in a Decode."""
        return len(self.in_flight[0].token_ids) if self.in_flight else 0

    def _take(self, message: SessionMessage) -> None:
        match message:
            case Open():
                self._mode = message.mode
                self._stop_ids = message.sampling.stop_ids(self._model_stop_ids)
                self.committed_len = len(message.prompt_ids)
            case Extend():
                self.committed_len = message.start + len(message.token_ids)
                if message.sampling is not None:
                    self._stop_ids = message.sampling.stop_ids(self._model_stop_ids)
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
        all_accepted = verdict.accepted == self._drafted
        self._base_round = (verdict.round_id, verdict.token_id) if all_accepted else None
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


def _check_sampling(mode: Mode, sampling: Sampling) -> None:
    if mode is Mode.IDS and not sampling.greedy:
        raise StateError(f"mode 'ids' at temperature {sampling.temperature}; allowed: temperature 0")
