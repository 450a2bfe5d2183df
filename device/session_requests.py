"""The requests of one session, answered whatever happens to the link or to the base station.

``client.py`` resends a request and backs off. Where the base station no longer has
the session, a new one is opened on all committed tokens (*reopen*) and the request is
sent in it. Randomness is a function of the position, so the answer stays the same.

Knows messages; not how tokens are drafted.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from device.client import Client
from device.drafter import DraftResult
from protocol.errors import (
    ClosingError,
    ContextLengthError,
    FaultError,
    FullError,
    LimitError,
    UnknownSessionError,
)
from protocol.messages import (
    VOCABULARY_VERSION,
    Close,
    Decode,
    Draft,
    Extend,
    Mode,
    Open,
    Opened,
    Reply,
    Request,
    Resume,
    Sampling,
    Verdict,
)
from protocol.rounds import SessionRounds, State

_RETRYABLE = (FullError.code, ClosingError.code, UnknownSessionError.code, LimitError.code)
"""``limit`` only where the base station turns out to have new limits."""


class SessionRequests:
    """The requests of one session, each answered whatever happens.

    Args:
        client: the greeted base station.
        mode: of the session.
        sampling: how the target is sampled.
        tokens: the committed tokens; the session that owns the list appends to it.
    """

    def __init__(self, client: Client, mode: Mode, sampling: Sampling, tokens: Sequence[int]) -> None:
        self._client = client
        self._mode = mode
        self._sampling = sampling
        self._tokens = tokens
        self._prefills = False
        self._session_id = client.new_session_id()
        self._rounds = SessionRounds(client.stop_ids)

    @property
    def ready(self) -> bool:
        """Whether no reply is outstanding."""
        return self._rounds.state is State.READY

    def open(self, prompt_ids: Sequence[int]) -> None:
        """Open the session on a prompt."""
        self._prefills = True
        next(self._replies(lambda: self._open(prompt_ids)))

    def extend(self, start: int, token_ids: Sequence[int], sampling: Sampling) -> None:
        """Keep the first ``start`` committed tokens, append ``token_ids``, and sample with these settings."""
        self._prefills = True
        before, self._sampling = self._sampling, sampling
        changed = None if sampling == before else sampling
        next(self._replies(lambda: Extend(self._session_id, self._rounds.round_id, start, tuple(token_ids), changed)))

    def can_extend(self, sampling: Sampling) -> bool:
        """Whether no reply is outstanding, and the base station can continue with these settings."""
        return self.ready and (sampling == self._sampling or self._client.welcome.version >= VOCABULARY_VERSION)

    def reopen(self, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Close the session and open a new one on a prompt."""
        self.close()
        self._sampling = sampling
        self._start_session()
        self.open(prompt_ids)

    def draft(
        self, drafted: DraftResult, while_waiting: Callable[[], None] | None = None
    ) -> tuple[Sequence[int], Verdict]:
        """Send a Draft; wait for its Verdict.

        Returns:
            The drafted tokens that were sent, fewer than ``drafted`` where a restarted base station allows fewer,
            and the Verdict.
        """
        count = 0

        def request() -> Draft:
            nonlocal count
            welcome = self._client.welcome
            count = min(len(drafted.token_ids), welcome.max_draft_len, welcome.context_length - len(self._tokens) - 1)
            token_ids, distributions = drafted.token_ids[:count], drafted.distributions[:count]
            return Draft(self._session_id, self._rounds.round_id, token_ids, distributions)

        verdict = next(self._replies(request, while_waiting))
        assert isinstance(verdict, Verdict)
        return drafted.token_ids[:count], verdict

    def decode(self, count: int) -> Iterator[Verdict]:
        """Let the target decode ``count`` tokens alone, at most to the end of its context; yield the Verdicts."""
        received = 0

        def remaining() -> Decode:
            room = self._client.welcome.context_length - len(self._tokens)
            return Decode(self._session_id, self._rounds.round_id, min(count - received, room))

        for verdict in self._replies(remaining):
            assert isinstance(verdict, Verdict)
            received += 1
            yield verdict

    def close(self) -> None:
        """Tell the base station that the session has ended, once."""
        if self._rounds.state is State.CLOSED:
            return
        close = Close(self._session_id)
        self._rounds.advance(close)
        self._client.send(close)

    def take_prefilled(self) -> bool:
        """Whether the base station may have prefilled since the last call, so that its reply took longer."""
        prefilled, self._prefills = self._prefills, False
        return prefilled

    def _replies(
        self,
        request: Callable[[], Request],
        while_waiting: Callable[[], None] | None = None,
        refused_at: float | None = None,
    ) -> Iterator[Reply]:
        """The replies to one request, across refusals and restarts of the base station.

        A session that is unknown again before any reply came counts as refused.

        Args:
            request: makes the request, or what is left of it, for the session as it is now.
            while_waiting: called once each time the request was sent.
            refused_at: time of the first refusal, by the client's clock.
        """
        unknown = False
        while True:
            sent = request()
            try:
                for reply in self._attempt(sent, while_waiting):
                    refused_at, unknown = None, False
                    yield reply
            except FaultError as fault:
                if fault.fault_code not in _RETRYABLE:
                    raise
                with self._client.paused_clock():
                    if fault.fault_code in (FullError.code, ClosingError.code) or unknown:
                        refused_at = self._client.back_off(fault, refused_at)
                    unknown, before = True, self._client.welcome
                    self._start_session()
                    if fault.fault_code == LimitError.code and self._client.welcome == before:
                        raise
                    if not isinstance(sent, Open):
                        next(self._replies(partial(self._open, self._tokens), refused_at=refused_at))
            else:
                return

    def _attempt(self, request: Request, while_waiting: Callable[[], None] | None) -> Iterator[Reply]:
        """The replies to one request, until the state machine has no more to await."""
        self._rounds.advance(request)
        resume = None if isinstance(request, Open | Extend) else self._resume
        for message in self._client.exchange(request, resume=resume, while_waiting=while_waiting):
            if not isinstance(message, Opened | Verdict) or self._is_stale(message):
                continue
            self._rounds.advance(message)
            yield message
            if self.ready:
                return

    def _start_session(self) -> None:
        """Greet, and take a new session id; the base station may have other limits and stop ids now."""
        self._client.greet()
        self._prefills = True
        self._session_id = self._client.new_session_id()
        self._rounds = SessionRounds(self._client.stop_ids)

    def _open(self, prompt_ids: Sequence[int]) -> Open:
        context_length = self._client.welcome.context_length
        if len(prompt_ids) >= context_length:
            raise ContextLengthError(
                "conversation",
                f"{len(prompt_ids)} tokens",
                f"at most {context_length - 1} (the target's context at the base station)",
            )
        return Open(self._session_id, 0, self._mode, self._sampling, tuple(prompt_ids))

    def _resume(self) -> Resume:
        return Resume.of(self._session_id, self._rounds.round_id, self._tokens)

    def _is_stale(self, reply: Reply) -> bool:
        """Whether a reply belongs to another session, to a past round, or follows one that was lost."""
        return reply.session_id != self._session_id or reply.round_id != self._rounds.round_id
