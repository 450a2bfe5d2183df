"""The engine owns the target: it runs what has arrived in passes, and hands out replies.

Knows sessions and peers by name; touches no socket. ``step`` is one pass:
gather, run, judge, deliver.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from basestation.memory import OutOfMemory, catch_out_of_memory
from basestation.metrics import Metrics
from basestation.pass_records import PassRecord, PassRecordFile, VerifiedRound
from basestation.scheduler import BUSY_SECONDS, PassBudget, ScheduledUnit, Scheduler
from basestation.session import Session
from basestation.target_model import TargetModel
from basestation.verify import VerificationResult, verify_rounds
from protocol.errors import ClosingError, EdgedraftError, FullError, MismatchError, StateError, UnknownSessionError
from protocol.limits import Limits
from protocol.messages import (
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    Close,
    Decode,
    Draft,
    Extend,
    Fault,
    Hello,
    Message,
    Mode,
    Open,
    Request,
    Resume,
    Welcome,
)

Deliver: TypeAlias = Callable[[bytes, Message], int]
"""Takes an address and a message for it; gives the bytes it takes."""

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 1.0
_MAX_GREETED = 10_000  # who is forgotten is told so, and greets again


@dataclass(frozen=True, slots=True)
class Peer:
    """Who speaks, and where it is answered.

    Attributes:
        owner: whose sessions these are: a device's public key, or its address where there are no keys.
        address: of the connection that the message came by.
    """

    owner: str
    address: bytes

    @classmethod
    def without_key(cls, address: bytes) -> "Peer":
        """A device that is nobody but its address."""
        return cls(address.hex(), address)

    def __str__(self) -> str:
        return self.owner[:8]


class Engine:
    """Sessions of many peers over one target model.

    Args:
        target: the model; nothing else may run it.
        limits: what a device may ask for.
        budget: how much fits into a pass.
        deliver: called with an address and every message for it.
        metrics: counts what happens.
        records: keeps a line for every round.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        target: TargetModel,
        limits: Limits,
        budget: PassBudget,
        deliver: Deliver,
        metrics: Metrics | None = None,
        records: PassRecordFile | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target = target
        self._limits = limits
        self._send = deliver
        self._metrics = metrics or Metrics()
        self._records = records
        self._clock = clock
        self._draining = False
        self._greeted: dict[str, int] = {}  # the version that each speaks
        self._sessions: dict[tuple[str, int], Session] = {}
        self._scheduler = Scheduler(target.kv_pool, budget, self._note_eviction)
        self._metrics.watch(self._sessions.__len__, target.kv_pool)

    @property
    def busy(self) -> bool:
        """Whether a pass has anything to do."""
        return any(session.waiting for session in self._sessions.values())

    @property
    def quiet(self) -> bool:
        """Whether no session has anything to do, nor had a moment ago."""
        now = self._clock()
        return not any(one.waiting or now - one.heard_at < _QUIET_SECONDS for one in self._sessions.values())

    def receive(self, peer: Peer, message: Message, size: int = 0) -> None:
        """Take a message of ``size`` bytes; what is wrong ends its session alone, with a Fault (invariant 7)."""
        session_id = getattr(message, "session_id", None)
        mode = self._mode_of(peer, session_id)
        try:
            self._dispatch(peer, message)
        except EdgedraftError as error:
            self.fault(peer, session_id, error)
        finally:
            self._metrics.count_uplink(mode or self._mode_of(peer, session_id), size)

    def fault(self, peer: Peer, session_id: int | None, error: EdgedraftError) -> None:
        """Tell a peer what it did wrong, and end the session it did it in."""
        place = {"peer": peer.owner, "session": session_id, "code": error.code}
        logger.warning("peer %s, session %s: %s", peer, session_id, error, extra=place)
        if session_id is not None:
            self._drop(peer.owner, session_id)
        self._tell_fault(peer, session_id, error)

    def drain(self) -> None:
        """Open no more sessions; those that are open go on."""
        self._draining = True

    def revoke(self, owner: str, error: EdgedraftError) -> None:
        """End all sessions of an owner, who has to greet again."""
        logger.warning("peer %s: %s", owner[:8], error)
        self._greeted.pop(owner, None)
        for key in [key for key in self._sessions if key[0] == owner]:
            self._tell_fault(Peer(owner, self._sessions[key].address), key[1], error)
            self._drop(*key)

    def step(self) -> None:
        """One pass over what waits: gather, run, judge, deliver."""
        self._run(self._scheduler.gather(self._sessions.values(), self._clock()))

    def _run(self, units: Sequence[ScheduledUnit]) -> None:
        if not units:
            return
        judged = [unit.session for unit in units if unit.segment.num_logits]
        lengths = [unit.session.kv_cache.length for unit in units]
        began, shortage = self._clock(), ""
        try:
            with catch_out_of_memory():
                logits = self._target.forward([unit.segment for unit in units])
                judging = self._clock()
                results = verify_rounds(logits, [session.round for session in judged])
        except OutOfMemory as error:
            shortage = str(error)
        if shortage:  # outside of the handler, where the error would keep the tensors of the pass
            for unit, length in zip(units, lengths, strict=True):
                unit.session.kv_cache.rollback(length)
            self._run_in_halves(units, shortage)
            return
        ended = self._clock()
        rounds = [
            self._conclude(session, result, began, ended) for session, result in zip(judged, results, strict=True)
        ]
        tokens = sum(len(unit.segment.token_ids) for unit in units)
        self._report(PassRecord(len(units), tokens, judging - began, ended - judging, rounds))

    def _conclude(self, session: Session, result: VerificationResult, began: float, ended: float) -> VerifiedRound:
        drafted, queueing_delay = session.round_len - 1, began - session.waiting_since
        verdict = session.commit(result)
        session.waiting_since = session.heard_at = ended
        self._deliver(session.address, verdict, session)
        return VerifiedRound(
            session.owner,
            verdict.session_id,
            verdict.round_id,
            session.mode,
            drafted,
            result.accepted,
            result.token_id,
            queueing_delay,
        )

    def _report(self, report: PassRecord) -> None:
        self._metrics.count_pass(report)
        if self._records:
            self._records.write(report)

    def _run_in_halves(self, units: Sequence[ScheduledUnit], shortage: str) -> None:
        """Run in fp16 what was too much for the memory.

        A session that is too much alone costs the silent their keys and values, and is refused if they have none.
        """
        self._metrics.count_out_of_memory()
        logger.warning("a pass of %d sessions is too much for the memory: %s", len(units), shortage)
        if len(units) > 1:
            half = len(units) // 2
            self._run(units[:half])
            self._run(units[half:])
        elif self._scheduler.evict_idle(self._sessions.values()):
            self._run(units)
        else:
            self._refuse(units[0].session)

    def _refuse(self, session: Session) -> None:
        session_id = next(key[1] for key, one in self._sessions.items() if one is session)
        seconds = round(BUSY_SECONDS)
        error = FullError(f"the base station is out of memory; come back in {seconds} s", seconds)
        self.fault(Peer(session.owner, session.address), session_id, error)

    def drop_idle(self) -> None:
        """Forget sessions whose device has been silent for ``limits.idle_timeout``."""
        kept = self._limits.idle_timeout
        oldest = self._clock() - kept
        for key, session in list(self._sessions.items()):
            if session.heard_at < oldest:
                owner, session_id = key
                logger.info(
                    "peer %s, session %s: silent for %d s, dropped", owner[:8], session_id, self._limits.idle_timeout
                )
                self._drop(*key)

    def close(self) -> None:
        """Tell every peer that the base station goes away."""
        for (owner, session_id), session in self._sessions.items():
            self._tell_fault(
                Peer(owner, session.address), session_id, ClosingError("the base station is shutting down")
            )
        self._sessions.clear()

    def _dispatch(self, peer: Peer, message: Message) -> None:
        match message:
            case Hello():
                self._greet(peer, message)
            case Open() | Draft() | Decode() | Extend():
                self._request(peer, message)
            case Resume():
                self._resume(peer, message)
            case Close():
                logger.info("peer %s, session %s: closed by its device", peer, message.session_id)
                self._drop(peer.owner, message.session_id)
            case Fault():
                logger.warning("peer %s reports %s: %s", peer, message.code, message.text)
                if message.session_id is not None:
                    self._drop(peer.owner, message.session_id)
            case _:
                raise StateError(f"{type(message).__name__} is for devices; a base station sends it")

    def _greet(self, peer: Peer, hello: Hello) -> None:
        self._check_hello(hello)
        version = min(hello.version, PROTOCOL_VERSION)
        self._greeted.pop(peer.owner, None)
        self._greeted[peer.owner] = version
        if len(self._greeted) > _MAX_GREETED:
            del self._greeted[next(iter(self._greeted))]
        limits = self._limits
        welcome = Welcome(
            version,
            self._target.name,
            self._target.context_length,
            limits.max_draft_len,
            tuple(Mode),
        )
        if welcome.version > OLDEST_VERSION:
            welcome = replace(
                welcome,
                max_prompt_len=limits.max_prompt_len,
                max_uplink_k=limits.max_uplink_k,
                max_sessions=limits.max_sessions,
                max_requests_per_second=limits.max_requests_per_second,
                window=limits.window,
            )
        self._deliver(peer.address, welcome)

    def _check_hello(self, hello: Hello) -> None:
        vocabulary = self._target.vocabulary
        if hello.version < OLDEST_VERSION:
            raise MismatchError(
                f"protocol version {hello.version}; this base station speaks {OLDEST_VERSION} to {PROTOCOL_VERSION}"
            )
        if hello.vocab_size != vocabulary.size:
            raise MismatchError(f"a draft model of {hello.vocab_size} tokens; the target has {vocabulary.size}")
        if hello.vocabulary_hash != vocabulary.sha256:
            raise MismatchError("the draft model's tokens are not the target's, though there are as many")
        if frozenset(hello.stop_ids) != vocabulary.stop_ids:
            raise MismatchError(
                f"a draft model that stops at the tokens {sorted(hello.stop_ids)}; "
                f"the target stops at {sorted(vocabulary.stop_ids)}"
            )

    def _request(self, peer: Peer, request: Request) -> None:
        if peer.owner not in self._greeted:
            raise UnknownSessionError(f"{type(request).__name__} before Hello")
        session = self._sessions.get((peer.owner, request.session_id))
        if session is None:
            if not isinstance(request, Open):
                raise UnknownSessionError(f"session {request.session_id} is not open")
            session = self._open(peer, request)
            replies = session.take(request)
            self._scheduler.check_room(session, self._sessions.values(), self._clock())
            session.owner, session.waiting_since = peer.owner, self._clock()
            self._sessions[peer.owner, request.session_id] = session
            prompt_len = len(request.prompt_ids)
            logger.info("peer %s, session %s: %s, %d tokens", peer, request.session_id, request.mode, prompt_len)
        else:
            if not session.waiting:
                session.waiting_since = self._clock()
            replies = session.take(request)
        session.heard_at, session.address = self._clock(), peer.address
        for reply in replies:
            self._deliver(peer.address, reply, session)

    def _open(self, peer: Peer, request: Open) -> Session:
        if self._draining:
            raise ClosingError("the base station is shutting down")
        self._limits.check("max_sessions", 1 + sum(owner == peer.owner for owner, _ in self._sessions))
        target = self._target
        return Session(
            request, target.new_kv_cache(), target.vocabulary.stop_ids, target.context_length, self._limits.window
        )

    def _resume(self, peer: Peer, message: Resume) -> None:
        session = self._sessions.get((peer.owner, message.session_id))
        if session is None:
            raise UnknownSessionError(f"session {message.session_id} is not open")
        self._deliver(peer.address, session.resume(message), session)
        session.heard_at, session.address = self._clock(), peer.address

    def _drop(self, owner: str, session_id: int) -> None:
        session = self._sessions.pop((owner, session_id), None)
        if session is not None:
            session.kv_cache.release()

    def _note_eviction(self, session: Session) -> None:
        self._metrics.count_eviction()
        logger.info("peer %s: keys and values of %d tokens gave way to others", session.owner[:8], len(session.tokens))

    def _tell_fault(self, peer: Peer, session_id: int | None, error: EdgedraftError) -> None:
        self._metrics.count_fault(error.code)
        known = self._greeted.get(peer.owner, OLDEST_VERSION) > OLDEST_VERSION  # the oldest take no further field
        self._deliver(peer.address, Fault(session_id, error.code, str(error), error.retry_seconds if known else 0))

    def _deliver(self, address: bytes, message: Message, session: Session | None = None) -> None:
        size = self._send(address, message)
        self._metrics.count_downlink(session.mode if session else None, size)

    def _mode_of(self, peer: Peer, session_id: int | None) -> Mode | None:
        session = None if session_id is None else self._sessions.get((peer.owner, session_id))
        return session.mode if session else None
