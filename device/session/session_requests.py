"""The requests of one session, answered whatever happens to the link or to the base station.

``client.py`` resends a request and backs off. Where the base station no longer has the
session, a new one is opened on all committed tokens (*reopen*) and the request is sent in
it; in place of an Extend, it is opened on the tokens that the Extend leaves. Randomness
is a function of the position, so the answer stays the same.

Knows messages; not how tokens are drafted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from device.drafting.drafter import DraftResult
from device.session.client import Client
from device.session.served_settings import check_context_length, check_prompt, check_sampling
from protocol.errors import (
    AdmissionError,
    ClosingError,
    FaultError,
    FullError,
    LimitError,
    StateError,
    UnknownSessionError,
)
from protocol.messages import (
    OLDEST_VERSION,
    VOCABULARY_VERSION,
    Close,
    Decode,
    Draft,
    Extend,
    Message,
    Mode,
    Open,
    Opened,
    Reply,
    Request,
    Resume,
    Sampling,
    Verdict,
    Welcome,
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
        asks_block_verification: open the session with block verification where the base station knows it.

    Attributes:
        block_verification: whether the session was opened with it.
        prefilling: tokens of a prompt that the base station may not have run yet.
    """

    def __init__(
        self,
        client: Client,
        mode: Mode,
        sampling: Sampling,
        tokens: Sequence[int],
        asks_block_verification: bool = False,
    ) -> None:
        self.block_verification = False
        self._client = client
        self._mode = mode
        self._sampling = sampling
        self._tokens = tokens
        self._asks_block_verification = asks_block_verification
        self._answer_start = 0
        self.prefilling = 0
        self._refused_at: float | None = None  # the first refusal since the last reply, by the client's clock
        self._unknown = False
        self._unconfirmed: Open | Extend | None = None  # taken as answered, though its Opened has not arrived
        self._unconfirmed_since = 0.0
        self._opened_seconds: float | None = None
        self._session_id = client.new_session_id()
        self._rounds = SessionRounds(client.stop_ids, client.welcome.window)

    @property
    def ready(self) -> bool:
        """Whether the next request may be sent."""
        return self._rounds.state is State.READY

    def open(self, prompt_ids: Sequence[int], wait: bool = True) -> None:
        """Open the session on a prompt.

        Args:
            prompt_ids: at least one token.
            wait: for the Opened; without it a refusal is that of the next request.

        Raises:
            SettingsError: the base station does not know these sampling settings.
        """
        self.prefilling = self._answer_start = len(prompt_ids)
        self._begin(lambda: self._open(prompt_ids), wait)

    def extend(self, start: int, token_ids: Sequence[int], sampling: Sampling, wait: bool = True) -> None:
        """Keep the first ``start`` committed tokens, append ``token_ids``, and sample with these settings.

        Args:
            start: from none to all of the committed tokens.
            token_ids: at least one.
            sampling: from now on.
            wait: for the Opened; without it a refusal is that of the next request.

        Raises:
            ContextLengthError: a new session must be opened on them, and they exceed a limit of the base station.
        """
        self.prefilling, self._answer_start = len(token_ids), start + len(token_ids)
        before, self._sampling = self._sampling, sampling
        changed = None if sampling == before else sampling
        extended = self._session_id

        def request() -> Extend | Open:
            if self._session_id == extended:
                return Extend(extended, self._next_round, start, tuple(token_ids), changed)
            prompt_ids = [*self._tokens[:start], *token_ids]
            check_prompt(len(prompt_ids), 0, self._client.welcome)
            self.prefilling = len(prompt_ids)
            return self._open(prompt_ids)

        self._begin(request, wait)

    def can_extend(self, sampling: Sampling) -> bool:
        """Whether no reply is awaited, and the base station can continue with these settings."""
        return self.ready and self.can_sample(sampling)

    def can_sample(self, sampling: Sampling) -> bool:
        """Whether the base station can continue the session with these settings."""
        return sampling == self._sampling or self._client.welcome.version >= VOCABULARY_VERSION

    def reopen(self, prompt_ids: Sequence[int], sampling: Sampling, wait: bool = True) -> None:
        """Close the session and open a new one on a prompt; see ``open``."""
        self.close()
        self._sampling = sampling
        self._start_session()
        self.open(prompt_ids, wait)

    @property
    def window(self) -> int:
        """How many Drafts may be in flight in this session."""
        return self._rounds.window

    @property
    def drafts_in_flight(self) -> int:
        """The number of Drafts without a Verdict."""
        return len(self._rounds.in_flight)

    def send_given(self, token_ids: Sequence[int]) -> None:
        """Send tokens of the prompt whose log-probabilities are asked for; ``verdict`` has them."""
        draft = Draft(self._session_id, self._next_round, tuple(token_ids), given=True)
        self._rounds.advance(draft)
        self._client.send(draft)

    def send_draft(self, drafted: DraftResult, assumed_bonus: int | None = None) -> None:
        """Send a Draft; while another is in flight, on the bonus token that is assumed to follow that one."""
        round_id, is_first = self._next_round, not (self._rounds.in_flight or self._unconfirmed)
        draft = Draft(self._session_id, round_id, drafted.token_ids, drafted.distributions, assumed_bonus)
        self._rounds.advance(draft)
        self._client.send(draft, is_first)

    def verdict(self, wait: bool = True) -> Verdict | None:
        """The Verdict of the oldest Draft in flight.

        Returns:
            None where none has arrived and ``wait`` is false, and where the session had to be opened again: then no
            Draft is in flight.
        """
        try:
            while message := self._next_message() if wait else self._client.arrived(self._session_id):
                self._note_opened(message)
                if isinstance(message, Verdict) and not self._is_stale(message):
                    self._rounds.advance(message)
                    self._refused_at, self._unknown = None, False
                    return message
        except FaultError as fault:
            self._recover(fault)
            self._open_again()
        return None

    def verdict_again(self) -> Verdict | None:
        """As ``verdict``, for Drafts whose Verdicts may have been received and discarded: they are sent again."""
        self._client.send_again(self._with_unconfirmed(*self._rounds.in_flight), self._resume_if_opened)
        return self.verdict()

    def decode(self, count: int, while_waiting: Callable[[], bool] = lambda: False) -> Iterator[Verdict]:
        """Let the target decode ``count`` tokens alone, at most to the end of its context; yield the Verdicts.

        ``while_waiting`` does a piece of work while no Verdict has arrived; says whether it did.
        """
        received = 0

        def remaining() -> Decode:
            room = self._client.welcome.context_length - len(self._tokens)
            return Decode(self._session_id, self._next_round, min(count - received, room))

        for verdict in self._replies(remaining, while_waiting):
            assert isinstance(verdict, Verdict)
            received += 1
            yield verdict

    def close(self) -> None:
        """Tell the base station that the session has ended, once."""
        if self._rounds.state in (State.NEW, State.CLOSED):
            return
        close = Close(self._session_id)
        self._rounds.advance(close)
        with suppress(AdmissionError):  # a base station that refuses the connection cannot be told
            self._client.send(close)

    def take_prefilled(self) -> int:
        """Tokens that the base station may have prefilled since the last call, so that its reply took longer."""
        prefilled, self.prefilling = self.prefilling, 0
        return prefilled

    def take_opened_seconds(self) -> float | None:
        """The time that the reply to an Open or Extend took at most, which was not waited for; None the next time."""
        seconds, self._opened_seconds = self._opened_seconds, None
        return seconds

    def _replies(
        self, request: Callable[[], Request], while_waiting: Callable[[], bool] = lambda: False
    ) -> Iterator[Reply]:
        """The replies to one request, across refusals and restarts of the base station.

        Args:
            request: makes the request, or what is left of it, for the session as it is now.
            while_waiting: does a piece of work while no reply has arrived; says whether it did.
        """
        while True:
            sent = request()
            try:
                for reply in self._attempt(sent, while_waiting):
                    self._refused_at, self._unknown = None, False
                    yield reply
            except FaultError as fault:
                self._recover(fault)
                if not isinstance(sent, Open | Extend):
                    self._open_again()
            else:
                return

    def _begin(self, request: Callable[[], Open | Extend], wait: bool) -> None:
        """Send an Open or Extend, and wait for its reply; else go on as if it was there.

        The reply is awaited in any case while an earlier one is, with a grammar, before whose compilation the base
        station takes no other request, and in the oldest version, where the window is not known (``_next_round``).
        """
        self._opened_seconds = None
        is_oldest = self._client.welcome.version == OLDEST_VERSION
        if wait or self._unconfirmed or self._sampling.grammar or is_oldest:
            next(self._replies(request))
            return
        sent = request()
        self._rounds.advance(sent)
        self._client.send(sent)
        self._rounds.advance(Opened(sent.session_id, sent.round_id))
        self._unconfirmed, self._unconfirmed_since = sent, self._client.now().seconds

    def _note_opened(self, message: Message) -> None:
        """Note what tells that the unconfirmed request was answered: its Opened, or a Verdict after it."""
        sent = self._unconfirmed
        if sent is None or not isinstance(message, Opened | Verdict) or message.session_id != sent.session_id:
            return
        if message.round_id == sent.round_id:
            self._opened_seconds = self._client.now().seconds - self._unconfirmed_since
        if message.round_id >= sent.round_id:
            self._unconfirmed = None

    def _with_unconfirmed(self, *requests: Request) -> tuple[Request, ...]:
        """The requests without a reply, oldest first."""
        return (self._unconfirmed, *requests) if self._unconfirmed else requests

    @property
    def _next_round(self) -> int:
        """The round of the next request.

        After an unconfirmed Extend it is the last one that a base station accepts which has the Extend, so that one
        which has lost it refuses the request.
        """
        skips = isinstance(self._unconfirmed, Extend) and not self._rounds.in_flight
        return self._rounds.next_round + (self._rounds.window - 1 if skips else 0)

    def _attempt(self, request: Request, while_waiting: Callable[[], bool]) -> Iterator[Reply]:
        """The replies to one request, until the state machine has no more to await."""
        self._rounds.advance(request)
        self._client.send(request, is_first=self._unconfirmed is None)
        is_opening = isinstance(request, Open | Extend)
        resume = None if is_opening else self._resume_if_opened
        while self._rounds.state is not State.READY:
            unconfirmed = self._unconfirmed
            for message in self._client.messages(self._with_unconfirmed(request), None, resume, while_waiting):
                self._note_opened(message)
                if isinstance(message, Opened | Verdict) and not self._is_stale(message):
                    self._rounds.advance(message)
                    yield message
                if self.ready or self._unconfirmed is not unconfirmed:
                    break

    def _next_message(self) -> Message:
        """The next message while Drafts are in flight."""
        unanswered = self._with_unconfirmed(*self._rounds.in_flight)
        return next(self._client.messages(unanswered, resume=self._resume_if_opened))

    def _recover(self, fault: FaultError) -> None:
        """Start a new session after a Fault that ended the old one; wait first where the base station refused it.

        A session that is unknown again before any reply came counts as refused.

        Raises:
            FaultError: the Fault, if another attempt would not help.
        """
        has_lost_extend = fault.fault_code == StateError.code and isinstance(self._unconfirmed, Extend)
        if fault.fault_code not in _RETRYABLE and not has_lost_extend:
            if fault.session_id is not None:  # it has ended
                self._forget_session()
            raise fault
        with self._client.paused_clock():
            if fault.fault_code in (FullError.code, ClosingError.code) or self._unknown:
                self._refused_at = self._client.back_off(fault, self._refused_at)
            self._unknown, before = True, self._client.welcome
            if fault.session_id is None:  # the base station still has the session
                self.close()
            self._start_session()
            if fault.fault_code == LimitError.code and _at_pace_of(before, self._client.welcome) == before:
                raise fault

    def _open_again(self) -> None:
        """Open the new session on all committed tokens; that alone does not prove that requests are answered again.

        Raises:
            ContextLengthError: they exceed a limit of the base station.
        """
        if len(self._tokens) == self._answer_start:
            check_prompt(len(self._tokens), 0, self._client.welcome)
        with self._client.paused_clock():
            refused_at = self._refused_at
            next(self._replies(partial(self._open, self._tokens)))
            self._refused_at, self._unknown = refused_at, True

    def _start_session(self) -> None:
        """Greet, and take a new session id; the base station may have other limits and stop ids now."""
        self._client.greet()
        self.prefilling = len(self._tokens)
        self._forget_session()

    def _forget_session(self) -> None:
        """Await nothing more in this session; the next one needs an Open."""
        self._session_id = self._client.new_session_id()
        self._unconfirmed = None
        self._rounds = SessionRounds(self._client.stop_ids, self._client.welcome.window)

    def _open(self, prompt_ids: Sequence[int]) -> Open:
        check_context_length("conversation", len(prompt_ids), self._client.welcome)
        check_sampling(self._sampling, self._client)
        answer_len = max(0, len(prompt_ids) - self._answer_start) if self._sampling.needs_answer_len else 0
        prompt = tuple(prompt_ids)
        self.block_verification = self._asks_block_verification and self._client.welcome.block_verification
        return Open(self._session_id, 0, self._mode, self._sampling, prompt, answer_len, self.block_verification)

    def _resume_if_opened(self) -> Resume | None:
        """The Resume of the session; None while an Open or Extend is unconfirmed: the base station may not have it."""
        if self._unconfirmed:
            return None
        return Resume.of(self._session_id, self._rounds.round_id, self._tokens)

    def _is_stale(self, reply: Reply) -> bool:
        """Whether a reply belongs to another session, to a past round, or follows one that was lost."""
        return reply.session_id != self._session_id or reply.round_id != self._rounds.round_id


def _at_pace_of(other: Welcome, welcome: Welcome) -> Welcome:
    """A Welcome with another one's pace, which changes all the time, for comparison."""
    return replace(welcome, pass_seconds=other.pass_seconds, row_seconds=other.row_seconds)
