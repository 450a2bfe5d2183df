"""The greeted base station: messages to it and from it, whatever happens to the link.

A request is sent again when no reply comes or the connection is a new one
(*resend*, behind a Resume), and when the base station's rate limit allows it again.
Where the base station is full or shutting down, the device waits and retries (*back off*).
Where nothing arrives for long (*outage*), the draft model may go on alone.

Knows messages and times; not how tokens are drafted.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from device.link.link import Link
from device.link.no_link import NoLink
from device.link.probe import unreachable_reason
from device.session.round_records import Moment, Moments, RoundRecord, RoundRecordFile
from device.settings import Timeouts
from protocol.bundle import Manifest
from protocol.errors import CancelledError, FaultError, LimitError, LinkError, MismatchError
from protocol.messages import (
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    Close,
    Fault,
    Hello,
    Message,
    Mode,
    Request,
    Resume,
    Verdict,
    Welcome,
)

logger = logging.getLogger(__name__)

_FIRST_PAUSE = 1.0
_CHECK_INTERVAL = 0.125
_JITTER = 0.25
"""Pauses are up to this share longer, at random, so that refused devices do not all retry at once."""


class Client:
    """A base station, which is greeted first; with ``timeouts.outage`` only once it is needed.

    Args:
        link: to the base station.
        manifest: of the draft model; the base station refuses one that does not match its target.
        timeouts: how long to wait.
        clock: seconds, monotonic.
        records: receives a line for each round.
        first_session: id of the first session; clients that share a key must not share ids.

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
        self._sent_at, self._sent_connections = clock(), 1
        self._repeat_at = math.inf  # once a rate limit is no longer exceeded
        self._is_cancelled: Callable[[], bool] = lambda: False
        self._on_round: Callable[[RoundRecord], None] | None = None
        self._draft_token: Callable[[], bool] | None = None
        self._probed_at, self._is_out = clock(), False
        self._manifest = manifest
        self._welcome: Welcome | None = None
        self._hello = Hello(
            PROTOCOL_VERSION, manifest.vocab_size, bytes.fromhex(manifest.vocabulary_hash), manifest.stop_ids
        )
        if not self.bridges_outages:
            self.greet_once()

    @property
    def welcome(self) -> Welcome:
        """The base station's Welcome: limits, modes and context length."""
        assert self._welcome is not None, "the base station was not greeted"
        return self._welcome

    @property
    def is_greeted(self) -> bool:
        """Whether the base station has answered a Hello."""
        return self._welcome is not None

    @property
    def is_offline(self) -> bool:
        """Whether there is no link, so that nothing ever arrives."""
        return isinstance(self.link, NoLink)

    @property
    def bridges_outages(self) -> bool:
        """Whether the draft model may go on alone in an outage."""
        return self._timeouts.outage is not None

    def greet_once(self) -> None:
        """Greet a base station that was not greeted; see ``greet``."""
        if not self.is_greeted:
            self.greet(self._timeouts.connect)

    def greet(self, timeout: float | None = None) -> None:
        """Send a Hello; fall back to the oldest version where the base station refuses the newest.

        Args:
            timeout: seconds to wait for the Welcome; None waits as long as for any reply.
        """
        try:
            self._welcome = self._greet_in(PROTOCOL_VERSION, timeout)
        except FaultError as fault:
            if fault.fault_code != MismatchError.code:
                raise
            self._welcome = self._greet_in(OLDEST_VERSION, timeout)
        except LinkError as error:
            reason = unreachable_reason(self.link.address)
            raise LinkError(f"{error}: {reason}") from error
        self.link.use_vocabulary(self.vocab_size)

    @property
    def vocab_size(self) -> int:
        """Tokens that both ends encode ids for: the target's, or the draft model's before version 3."""
        told = self._welcome.vocab_size if self._welcome else 0
        return told or self._manifest.vocab_size

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer on both ends: the target's, or the draft model's before version 3."""
        is_told = self._welcome is not None and self._welcome.vocab_size
        return frozenset(self.welcome.stop_ids if is_told else self._manifest.stop_ids)

    def new_session_id(self) -> int:
        """An id that no session of this client has had."""
        self._next_session += 1
        return self._next_session - 1

    def exchange(
        self,
        request: Hello | Request,
        timeout: float | None = None,
        resume: Callable[[], Resume | None] | None = None,
        while_waiting: Callable[[], bool] = lambda: False,
    ) -> Iterator[Message]:
        """Send a request, and yield what the base station sends from then on; see ``messages``."""
        self.send(request)
        return self.messages((request,), timeout, resume, while_waiting)

    def messages(
        self,
        unanswered: Sequence[Hello | Request],
        timeout: float | None = None,
        resume: Callable[[], Resume | None] | None = None,
        while_waiting: Callable[[], bool] = lambda: False,
    ) -> Iterator[Message]:
        """What the base station sends in answer to requests.

        They are sent again after ``timeouts.resend`` seconds without one and over a new connection, behind a Resume.

        Args:
            unanswered: sent before, oldest first.
            timeout: seconds without a message after which the device gives up; None for ``timeouts.retry``.
            resume: makes the Resume of the session, None where there is none; sent where the base station knows it.
            while_waiting: does a piece of work while no message has arrived; says whether it did.

        Raises:
            LinkError: the base station sends nothing for ``timeout`` seconds, and nothing bridges the outage.
            FaultError: the base station answers with a Fault.
        """
        limit = self._timeouts.retry if timeout is None else timeout
        received_at = heard_at = self._clock()
        while True:
            message = self._receive(0)
            is_bridged = message is None and self._bridge_outage(heard_at, limit)
            if message is None and not is_bridged and not while_waiting():
                message = self._receive(min(self._timeouts.resend, limit))
            now = self._clock()
            if message is not None:
                heard_at = now
                if self._may_answer(unanswered[0], message):
                    received_at = now
                    yield message
                elif self._reconnected:
                    received_at = now  # the requests, which an outage may have lost, are sent again next
            elif (waited := now - received_at) >= limit and not (is_bridged or self._bridge_outage(heard_at, limit)):
                raise LinkError(f"no base station answers at {self.link.address} (waited {waited:.0f} s)")
            elif self._reconnected or now >= self._next_resend(received_at):
                self.send_again(unanswered, resume)

    def arrived(self, session_id: int) -> Message | None:
        """The next message of the base station, if one has arrived.

        Raises:
            FaultError: it is a Fault of this session or of none.
        """
        message = self._receive(0)
        if message is not None and not self._exceeds_rate(message):
            _raise_fault(message, session_id)
        return message

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
            CancelledError: nobody waits for the answer any more.
        """
        began = self._clock()
        waited = 0.0 if since is None else began - since
        seconds = refusal.retry_seconds or min(max(_FIRST_PAUSE, waited), self._timeouts.resend)
        pause = seconds * random.uniform(1, 1 + _JITTER)  # noqa: S311 - not a secret
        refused_at = began if since is None else since
        if waited + pause > self._timeouts.retry and not self._bridge_outage(refused_at):
            text = f"{refusal.text} (waited {waited:.0f} s)"
            raise FaultError(refusal.fault_code, text, math.ceil(seconds), refusal.session_id) from refusal
        if since is None:
            logger.warning("waiting for up to %.0f s: %s", self._timeouts.retry, refusal.text)
        connections = self.link.connections
        while (left := began + pause - self._clock()) > 0 and self.link.connections == connections:
            self._receive(0 if self._bridge_outage(refused_at) else left)  # messages of sessions that have ended
        return refused_at

    def send(self, message: Hello | Request | Close, is_first: bool = True) -> None:
        """Send a message; ``messages`` yields the replies.

        ``is_first`` is false behind other unanswered requests. Where a new connection may have lost those, this one is
        not sent now but with them, so that it does not arrive before them.
        """
        if not is_first and self._reconnected:
            return
        self.link.send(message)
        self._sent_at = self._clock()
        if is_first:
            self._sent_connections = max(1, self.link.connections)

    def send_again(self, requests: Sequence[Hello | Request], resume: Callable[[], Resume | None] | None) -> None:
        """Send unanswered requests again, behind a Resume where the base station knows it; see ``messages``."""
        self._repeat_at = math.inf
        if self._is_out and self.is_greeted and not self._reconnected:  # requests would pile up in the socket
            self.send(self._probe)
            return
        if resume and self.welcome.version > OLDEST_VERSION and (message := resume()):
            self.link.send(message)
        for index, request in enumerate(requests):
            self.send(request, is_first=index == 0)

    def now(self) -> Moment:
        """The clock, which ``paused_clock`` stops, and the bytes counted so far."""
        return Moment(self._clock() - self._paused_seconds, self.link.uplink_bytes, self.link.downlink_bytes)

    @contextmanager
    def cancelled_by(self, is_cancelled: Callable[[], bool]) -> Iterator[None]:
        """Ask ``is_cancelled`` while waiting and before each step of an answer; end the answer where it says so."""
        self._is_cancelled = is_cancelled
        try:
            yield
        finally:
            self._is_cancelled = lambda: False

    @contextmanager
    def bridged_by(self, draft_token: Callable[[], bool]) -> Iterator[None]:
        """Call ``draft_token`` again and again in an outage, if ``bridges_outages``; it says whether it drafted one."""
        self._draft_token = draft_token
        try:
            yield
        finally:
            self._draft_token = None

    @contextmanager
    def reporting_rounds_to(self, on_round: Callable[[RoundRecord], None]) -> Iterator[None]:
        """Call ``on_round`` with the record of each round, before its tokens are committed."""
        self._on_round = on_round
        try:
            yield
        finally:
            self._on_round = None

    def check_cancelled(self) -> None:
        """End the answer if nobody waits for it any more.

        Raises:
            CancelledError: nobody does.
        """
        if self._is_cancelled():
            raise CancelledError("nobody waits for the answer any more")

    @contextmanager
    def paused_clock(self) -> Iterator[None]:
        """Stop the clock of ``now``: time lost to refusals and restarts is not a delay of the link."""
        before, began = self._paused_seconds, self._clock()
        yield
        self._paused_seconds = before + self._clock() - began

    def record(self, mode: Mode, verdict: Verdict, draft_len: int, drafted: int, moments: Moments) -> None:
        """Write a round to the record file and report it, where either is asked for; see ``RoundRecord.of``."""
        if not self._records and not self._on_round:
            return
        record = RoundRecord.of(self.link.device, mode, verdict, draft_len, drafted, moments)
        if self._records:
            self._records.write(record)
        if self._on_round:
            self._on_round(record)

    def close(self) -> None:
        """Close the link."""
        self.link.close()

    def _receive(self, seconds: float) -> Message | None:
        """The next message, or None after at most ``seconds``."""
        self.check_cancelled()
        message = self.link.receive(min(seconds, _CHECK_INTERVAL))
        if message is not None and self._is_out:
            self._is_out = False
            self._sent_connections = 0  # what is unanswered is sent again, as over a new connection
            logger.info("the base station answers again")
        return message

    def _next_resend(self, received_at: float) -> float:
        """When unanswered requests are sent again, where the last reply came at ``received_at``."""
        return min(max(self._sent_at, received_at) + self._timeouts.resend, self._repeat_at)

    def _may_answer(self, request: Hello | Request, message: Message) -> bool:
        """Whether a message may answer the oldest request without a reply: a Welcome may be the reply to a probe.

        Raises:
            FaultError: it is a Fault of the request's session or of none.
        """
        if self._exceeds_rate(message) or (isinstance(message, Welcome) and not isinstance(request, Hello)):
            return False
        _raise_fault(message, getattr(request, "session_id", None))
        return True

    def _exceeds_rate(self, message: Message) -> bool:
        """Whether a message tells that requests were dropped at a rate limit; it also tells when to repeat them."""
        if not isinstance(message, Fault) or message.session_id is not None or message.code != LimitError.code:
            return False
        if not message.retry_seconds:
            return False
        self._repeat_at = self._clock() + message.retry_seconds
        return True

    def _bridge_outage(self, silent_since: float, limit: float = math.inf) -> bool:
        """Have the draft model add a token where the base station is silent for too long; whether it did.

        Half-way a Hello, which is answered at once, finds out whether the base station is there but busy.
        """
        if self._draft_token is None or self._timeouts.outage is None:
            return False
        silent, outage = self._clock() - silent_since, min(self._timeouts.outage, limit)
        if silent < outage:
            if self.is_greeted and silent >= outage / 2 and self._probed_at <= silent_since:
                self._probed_at = self._clock()
                self.link.send(self._probe)
            return False
        if not self._is_out and not self.is_offline:
            logger.info("nothing from the base station for %.0f s: the draft model goes on alone", silent)
        self._is_out = True
        with self.paused_clock():
            return self._draft_token()

    @property
    def _reconnected(self) -> bool:
        """Whether there is a new connection since the oldest unanswered request was sent."""
        return self.link.connections > self._sent_connections

    @property
    def _probe(self) -> Hello:
        """Finds out whether a greeted base station is there."""
        return replace(self._hello, version=self.welcome.version)

    def _greet_in(self, version: int, timeout: float | None) -> Welcome:
        hello = replace(self._hello, version=version)
        return next(message for message in self.exchange(hello, timeout) if isinstance(message, Welcome))


def _raise_fault(message: Message, session_id: int | None) -> None:
    """Raise a Fault of this session or of none; a Fault of another session ends that one alone."""
    if isinstance(message, Fault) and message.session_id in (None, session_id):
        raise FaultError(message.code, message.text, message.retry_seconds, message.session_id)
