"""A base station as the device sees it: requests until they are answered, refusals, and sessions on it.

A request is repeated until its reply is there, so lost frames cost time and
nothing else.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from device.draft_model import DraftModel
from device.link import Link
from device.planner import Planner
from device.round_records import Moment, Moments, RoundRecord, RoundRecordFile
from device.session import DeviceSession, DraftSettings
from protocol.bundle import Manifest, QualityFigures
from protocol.errors import FaultError, LinkError, MismatchError, SettingsError
from protocol.messages import (
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    Close,
    Encoding,
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
_JITTER = 0.25
"""How much longer than it should a pause may be, so that not all who were refused come back at once."""


@dataclass(frozen=True)
class Timeouts:
    """Times in seconds: when to repeat a request, and when to give up.

    ``reply`` is the patience with silence, and with a base station that is full or being stopped.
    """

    connect: float = 5.0
    repeat: float = 5.0
    reply: float = 60.0


class Client:
    """A greeted base station.

    Args:
        link: to the base station.
        manifest: of the draft model; the base station refuses one that is not its target's kin.
        patience: how long to wait.
        clock: seconds, monotonic.
        records: keeps a line for every round.
        first_session: id of the first session; clients that share a key must not share ids.

    Raises:
        LinkError: nobody answers within ``patience.connect``.
        FaultError: the base station refuses the draft model.
    """

    def __init__(
        self,
        link: Link,
        manifest: Manifest,
        patience: Timeouts | None = None,
        clock: Callable[[], float] = time.monotonic,
        records: RoundRecordFile | None = None,
        first_session: int = 0,
    ) -> None:
        self._link = link
        self._records = records
        self._patience = patience or Timeouts()
        self.clock = clock
        self._next_session = first_session
        self._paused_seconds = 0.0
        self._planners: dict[tuple[Mode, float, int | None], Planner] = {}
        self._hello = Hello(
            PROTOCOL_VERSION, manifest.vocab_size, bytes.fromhex(manifest.vocabulary_hash), manifest.stop_ids
        )
        self.greet(self._patience.connect)

    def open(self, settings: DraftSettings, model: DraftModel, prompt_ids: list[int]) -> DeviceSession:
        """Open a session on a prompt.

        Raises:
            SettingsError: the base station does not serve the mode, the draft length or as many entries.
            ContextLengthError: the prompt does not fit both models' contexts, or is more than the base station takes.
        """
        welcome, encoding = self.welcome, settings.mode.encoding
        if settings.mode not in welcome.modes or (encoding and encoding not in welcome.encodings):
            raise SettingsError("mode", str(settings.mode), ", ".join(welcome.modes))
        if settings.draft_len is not None and settings.draft_len > welcome.max_draft_len:
            raise SettingsError("draft-len", settings.draft_len, f"1 to {welcome.max_draft_len}")
        if encoding is Encoding.SPARSE and settings.uplink_k > welcome.max_uplink_k:
            raise SettingsError("uplink-k", settings.uplink_k, f"1 to {welcome.max_uplink_k}")
        context_length = min(self.welcome.context_length, model.manifest.context_length)
        return DeviceSession(self, settings, model, context_length, prompt_ids)

    def planner(self, settings: DraftSettings, manifest: Manifest) -> Planner:
        """What has been learnt about draft lengths, here and with such settings.

        Rounds of a fixed draft length teach the plan nothing: their pace is not what it would reach.
        """
        key = (settings.mode, settings.sampling.temperature, settings.draft_len)
        if key not in self._planners:
            self._planners[key] = self._new_planner(manifest.quality, settings.sampling.greedy)
        return self._planners[key]

    def _new_planner(self, quality: QualityFigures, greedy: bool) -> Planner:
        return Planner(quality, greedy)

    def new_session_id(self) -> int:
        """A number that no session of this client has had."""
        self._next_session += 1
        return self._next_session - 1

    def greet(self, patience: float | None = None) -> None:
        """Greet the base station, anew where it has forgotten this device; one of an older version in its own.

        Args:
            patience: seconds to wait; left out, as long as for any reply.
        """
        try:
            self.welcome = self._greet_in(PROTOCOL_VERSION, patience)
        except FaultError as fault:
            if fault.fault_code != MismatchError.code:
                raise
            self.welcome = self._greet_in(OLDEST_VERSION, patience)
        except LinkError as error:
            raise LinkError(f"{error}; start one with: edgedraft-basestation serve --target MODEL") from error

    def _greet_in(self, version: int, patience: float | None) -> Welcome:
        hello = replace(self._hello, version=version)
        return next(message for message in self.exchange(hello, patience) if isinstance(message, Welcome))

    def exchange(
        self,
        request: Hello | Request,
        patience: float | None = None,
        resume: Callable[[], Resume] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Iterator[Message]:
        """Send a request, do something ``meanwhile``, and give what comes back.

        It is repeated whenever the base station is silent or the link is connected
        again, behind a Resume where there is one and the base station knows it.

        Raises:
            LinkError: the base station is silent for ``patience`` (else ``patience.reply``) seconds.
            FaultError: it answers with a Fault.
        """
        limit = self._patience.reply if patience is None else patience
        self._link.send(request)
        connections = max(1, self._link.connections)
        heard = sent = self.clock()
        if meanwhile:
            meanwhile()
        while True:
            message = self._link.receive(min(self._patience.repeat, limit))
            now = self.clock()
            if message is None:
                if now - heard >= limit:
                    raise LinkError(f"no base station answers at {self._link.address} (waited {now - heard:.0f} s)")
                if now - sent >= self._patience.repeat or self._link.connections > connections:
                    if resume and self.welcome.version > OLDEST_VERSION:
                        self._link.send(resume())
                    self._link.send(request)
                    sent, connections = now, max(1, self._link.connections)
                continue
            heard = now
            _raise_fault(message, getattr(request, "session_id", None))
            yield message

    def tell(self, message: Close) -> None:
        """Send what needs no answer."""
        self._link.send(message)

    def now(self) -> Moment:
        """The clock, which ``stopped_clock`` stops, and the bytes so far."""
        return Moment(self.clock() - self._paused_seconds, self._link.uplink_bytes, self._link.downlink_bytes)

    def record(self, mode: Mode, verdict: Verdict, draft_len: int, drafted: int, moments: Moments) -> None:
        """Have a round written down, where anybody wants that; see ``RoundRecord.of``."""
        if self._records:
            self._records.write(RoundRecord.of(self._link.device, mode, verdict, draft_len, drafted, moments))

    @contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """Let ``now`` stand still: what a base station refuses or has forgotten is no delay of the link."""
        before, began = self._paused_seconds, self.clock()
        yield
        self._paused_seconds = before + self.clock() - began

    def pause(self, refusal: FaultError, since: float | None) -> float:
        """Let time pass where the base station is full or being stopped; a new connection ends it.

        It lasts as long as the Fault says, or else as long again as since the first refusal.

        Args:
            refusal: the Fault.
            since: when it was refused first, by ``clock``; None for now.

        Returns:
            ``since``, or now.

        Raises:
            FaultError: to come back would be more than ``patience.reply`` seconds after the first refusal.
        """
        began = self.clock()
        waited = 0.0 if since is None else began - since
        seconds = refusal.retry_seconds or min(max(_FIRST_PAUSE, waited), self._patience.repeat)
        pause = seconds * random.uniform(1, 1 + _JITTER)  # noqa: S311 - no secret
        if waited + pause > self._patience.reply:
            text = f"{refusal.text} (waited {waited:.0f} s)"
            raise FaultError(refusal.fault_code, text, math.ceil(seconds)) from refusal
        if since is None:
            logger.warning("waiting for up to %.0f s: %s", self._patience.reply, refusal.text)
        connections = self._link.connections
        while (left := began + pause - self.clock()) > 0 and self._link.connections == connections:
            self._link.receive(left)  # whatever comes is of a session that is over
        return began if since is None else since


def _raise_fault(message: Message, session_id: int | None) -> None:
    """Raise a Fault that is about this session or about none; one of another session ends that one alone."""
    if isinstance(message, Fault) and message.session_id in (None, session_id):
        raise FaultError(message.code, message.text, message.retry_seconds)
