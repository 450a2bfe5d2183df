"""Requests to the base station, answered whatever happens to the link or to the base station.

A request is sent again when no reply comes or the connection is a new one
(*resend*, behind a Resume). Where the base station is full or shutting down, the
device waits and retries (*back off*). Where it no longer has the session, the
device opens a new one on all committed tokens (*reopen*). Randomness is a
function of the position, so the answer stays the same.

Knows messages and times; not how tokens are drafted.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from device.drafter import DraftResult
from device.link import Link
from device.probe import unreachable_reason
from device.round_records import Moment, Moments, RoundRecord, RoundRecordFile
from device.settings import DraftSettings, Timeouts
from protocol.bundle import Manifest
from protocol.errors import (
    ClosingError,
    ContextLengthError,
    FaultError,
    FullError,
    LimitError,
    LinkError,
    MismatchError,
    SettingsError,
    UnknownSessionError,
)
from protocol.messages import (
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    VOCABULARY_VERSION,
    Close,
    Decode,
    Draft,
    Encoding,
    Extend,
    Fault,
    Hello,
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

logger = logging.getLogger(__name__)

_FIRST_PAUSE = 1.0
_JITTER = 0.25
"""Pauses are up to this share longer, at random, so that refused devices do not all retry at once."""
_RETRYABLE = (FullError.code, ClosingError.code, UnknownSessionError.code, LimitError.code)
"""``limit`` only where the base station turns out to have new limits."""


class Client:
    """A greeted base station.

    Args:
        link: to the base station.
        manifest: of the draft model; the base station refuses one that does not match its target.
        timeouts: how long to wait.
        clock: seconds, monotonic.
        records: receives a line for each round.
        first_session: id of the first session; clients that share a key must not share ids.

    Attributes:
        welcome: the base station's Welcome: limits, modes and context length.

    Raises:
        LinkError: no base station answers within ``timeouts.connect``.
        FaultError: the base station refuses the draft model.
    """

    def __init__(
        self,
        link: Link,
        manifest: Manifest,
        timeouts: Timeouts | None = None,
        clock: Callable[[], float] = time.monotonic,
        records: RoundRecordFile | None = None,
        first_session: int = 0,
    ) -> None:
        self.link = link
        self._records = records
        self._timeouts = timeouts or Timeouts()
        self._clock = clock
        self._next_session = first_session
        self._paused_seconds = 0.0
        self._manifest = manifest
        self._hello = Hello(
            PROTOCOL_VERSION, manifest.vocab_size, bytes.fromhex(manifest.vocabulary_hash), manifest.stop_ids
        )
        self.greet(self._timeouts.connect)

    def greet(self, timeout: float | None = None) -> None:
        """Send a Hello; fall back to the oldest version where the base station refuses the newest.

        Args:
            timeout: seconds to wait for the Welcome; None waits as long as for any reply.
        """
        try:
            self.welcome = self._greet_in(PROTOCOL_VERSION, timeout)
        except FaultError as fault:
            if fault.fault_code != MismatchError.code:
                raise
            self.welcome = self._greet_in(OLDEST_VERSION, timeout)
        except LinkError as error:
            reason = unreachable_reason(self.link.address)
            raise LinkError(f"{error}: {reason}; start one with: edgedraft-basestation serve --target MODEL") from error
        self.link.use_vocabulary(self.vocab_size)

    @property
    def vocab_size(self) -> int:
        """Tokens that both ends encode ids for: the target's, or the draft model's before version 3."""
        return self.welcome.vocab_size or self._manifest.vocab_size

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer on both ends: the target's, or the draft model's before version 3."""
        return frozenset(self.welcome.stop_ids if self.welcome.vocab_size else self._manifest.stop_ids)

    def check_served(self, settings: DraftSettings) -> None:
        """Check settings against the base station's Welcome.

        Raises:
            SettingsError: the base station does not serve the mode, the draft length or the number of entries.
        """
        welcome, encoding = self.welcome, settings.mode.encoding
        if settings.mode not in welcome.modes or (encoding and encoding not in welcome.encodings):
            raise SettingsError("mode", str(settings.mode), ", ".join(welcome.modes))
        if settings.draft_len is not None and settings.draft_len > welcome.max_draft_len:
            raise SettingsError("draft-len", settings.draft_len, f"1 to {welcome.max_draft_len}")
        if encoding is Encoding.SPARSE and settings.uplink_k > welcome.max_uplink_k:
            raise SettingsError("uplink-k", settings.uplink_k, f"1 to {welcome.max_uplink_k}")

    def new_session_id(self) -> int:
        """An id that no session of this client has had."""
        self._next_session += 1
        return self._next_session - 1

    def exchange(
        self,
        request: Hello | Request,
        timeout: float | None = None,
        resume: Callable[[], Resume] | None = None,
        while_waiting: Callable[[], None] | None = None,
    ) -> Iterator[Message]:
        """Send a request, and yield what the base station sends from then on.

        The request is sent again after ``timeouts.resend`` seconds without a message and over a new connection;
        behind a Resume where ``resume`` makes one and the base station knows the message.

        Args:
            request: to send.
            timeout: seconds without a message after which the device gives up; None for ``timeouts.retry``.
            resume: makes the Resume of the session.
            while_waiting: called once, after the request was sent.

        Raises:
            LinkError: the base station sends nothing for ``timeout`` seconds.
            FaultError: the base station answers with a Fault.
        """
        limit = self._timeouts.retry if timeout is None else timeout
        self.link.send(request)
        connections = max(1, self.link.connections)
        received_at = sent_at = self._clock()
        if while_waiting:
            while_waiting()
        while True:
            message = self.link.receive(min(self._timeouts.resend, limit))
            now = self._clock()
            if message is not None:
                received_at = now
                _raise_fault(message, getattr(request, "session_id", None))
                yield message
            elif (waited := now - received_at) >= limit:
                raise LinkError(f"no base station answers at {self.link.address} (waited {waited:.0f} s)")
            elif now - sent_at >= self._timeouts.resend or self.link.connections > connections:
                self._resend(request, resume)
                sent_at, connections = now, max(1, self.link.connections)

    def back_off(self, refusal: FaultError, since: float | None) -> float:
        """Wait where the base station is full or shutting down; a new connection ends the wait.

        Waits as long as the Fault says, else as long again as since the first refusal.

        Args:
            refusal: the Fault.
            since: time of the first refusal, by the client's clock; None for now.

        Returns:
            ``since``, or now.

        Raises:
            FaultError: the next attempt would be more than ``timeouts.retry`` seconds after the first refusal.
        """
        began = self._clock()
        waited = 0.0 if since is None else began - since
        seconds = refusal.retry_seconds or min(max(_FIRST_PAUSE, waited), self._timeouts.resend)
        pause = seconds * random.uniform(1, 1 + _JITTER)  # noqa: S311 - not a secret
        if waited + pause > self._timeouts.retry:
            text = f"{refusal.text} (waited {waited:.0f} s)"
            raise FaultError(refusal.fault_code, text, math.ceil(seconds)) from refusal
        if since is None:
            logger.warning("waiting for up to %.0f s: %s", self._timeouts.retry, refusal.text)
        connections = self.link.connections
        while (left := began + pause - self._clock()) > 0 and self.link.connections == connections:
            self.link.receive(left)  # messages of sessions that have ended
        return began if since is None else since

    def send(self, message: Close) -> None:
        """Send a message that has no reply."""
        self.link.send(message)

    def now(self) -> Moment:
        """The clock, which ``paused_clock`` stops, and the bytes counted so far."""
        return Moment(self._clock() - self._paused_seconds, self.link.uplink_bytes, self.link.downlink_bytes)

    @contextmanager
    def paused_clock(self) -> Iterator[None]:
        """Stop the clock of ``now``: time lost to refusals and restarts is not a delay of the link."""
        before, began = self._paused_seconds, self._clock()
        yield
        self._paused_seconds = before + self._clock() - began

    def record(self, mode: Mode, verdict: Verdict, draft_len: int, drafted: int, moments: Moments) -> None:
        """Write a round to the record file, if there is one; see ``RoundRecord.of``."""
        if self._records:
            self._records.write(RoundRecord.of(self.link.device, mode, verdict, draft_len, drafted, moments))

    def close(self) -> None:
        """Close the link."""
        self.link.close()

    def _resend(self, request: Hello | Request, resume: Callable[[], Resume] | None) -> None:
        if resume and self.welcome.version > OLDEST_VERSION:
            self.link.send(resume())
        self.link.send(request)

    def _greet_in(self, version: int, timeout: float | None) -> Welcome:
        hello = replace(self._hello, version=version)
        return next(message for message in self.exchange(hello, timeout) if isinstance(message, Welcome))


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
        """Tell the base station that the session has ended."""
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


def _raise_fault(message: Message, session_id: int | None) -> None:
    """Raise a Fault of this session or of none; a Fault of another session ends that one alone."""
    if isinstance(message, Fault) and message.session_id in (None, session_id):
        raise FaultError(message.code, message.text, message.retry_seconds)
