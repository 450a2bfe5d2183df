"""The engine owns the target: it takes requests, runs them in batches and delivers the replies.

Knows sessions and peers by name; touches no socket. ``step`` is one forward pass:
schedule, run, verify, deliver.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeAlias

from basestation.devices.faults import counted_fault, log_fault
from basestation.devices.handshake import Handshake
from basestation.devices.peer import Peer
from basestation.devices.rate_limit import RateLimiter
from basestation.engine.load import Load
from basestation.engine.pace import Pace, PassTimes
from basestation.engine.pass_clock import PassClock
from basestation.engine.pass_records import PassRecord, PassRecordFile, VerifiedRound
from basestation.engine.scheduler import BUSY_SECONDS, PassBudget, ScheduledUnit, Scheduler, is_active
from basestation.kv_cache.memory import OutOfMemory, catch_out_of_memory
from basestation.monitoring.metrics import Metrics
from basestation.sessions.grammars import Grammars, RunElsewhere, run_here
from basestation.sessions.session import Session
from basestation.sessions.session_table import SessionTable
from basestation.target.served_target import ServedTarget
from basestation.target.target_model import TargetModel
from basestation.verification.verify import RoundToVerify, VerificationResult, verify_rounds
from protocol.errors import (
    ClosingError,
    EdgedraftError,
    FullError,
    GrammarError,
    NonFiniteError,
    StateError,
    UnknownSessionError,
)
from protocol.limits import Limits
from protocol.messages import Close, Decode, Draft, Extend, Fault, Hello, Message, Mode, Open, Reply, Request, Resume

Deliver: TypeAlias = Callable[[bytes, Message], int]
"""Sends a message to an address; returns its size in bytes."""

logger = logging.getLogger(__name__)


class Engine:
    """Sessions of many peers over one target model.

    Args:
        target: the model; nothing else may run it.
        limits: of what a device may request.
        budget: of a forward pass.
        deliver: called with an address and every message for it.
        metrics: counters.
        records: gets a line for every round.
        clock: seconds, monotonic.
        run_elsewhere: how grammars are compiled.
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
        run_elsewhere: RunElsewhere = run_here,
    ) -> None:
        self._target = target
        self._limits = limits
        self._send = deliver
        self._metrics = metrics or Metrics()
        self._records = records
        self._clock = clock
        self._draining = False
        self._handshake = Handshake(ServedTarget.of(target), limits)
        self._grammars = Grammars(target.grammar_compiler, limits.max_held_bytes, run_elsewhere)
        self._pass_times = PassTimes()
        self._sessions = SessionTable(limits)
        self._repetitions = RateLimiter(limits.max_requests_per_second, clock)
        self._scheduler = Scheduler(target.kv_pool, budget, self._note_eviction)
        self._kv_share, self._pace = 0.0, Pace()
        self._metrics.watch(self._sessions.count_by_name, target.kv_pool)

    @property
    def load(self) -> Load:
        """The sessions now, and the rest as of the last ``measure_load``. Any thread may ask."""
        return Load(self._sessions.keys(), self._kv_share, self._pace)

    def measure_load(self) -> None:
        """Measure what ``load`` tells besides the sessions."""
        sessions = self._sessions.all()
        self._kv_share = self._scheduler.required_share(sessions, self._clock())
        self._pace = self._pass_times.pace(self._count_active(sessions))

    @property
    def busy(self) -> bool:
        """Whether any session has something to run."""
        return any(session.waiting for session in self._sessions.all())

    @property
    def idle(self) -> bool:
        """Whether no session has something to run, and none was active in the last second."""
        return not self._count_active(self._sessions.all())

    def receive(self, peer: Peer, message: Message, size: int = 0) -> None:
        """Take a message of ``size`` bytes; an error ends its session alone, with a Fault (invariant 7)."""
        session_id = getattr(message, "session_id", None)
        mode = self._mode_of(peer, session_id)
        if peer.version:
            self._handshake.note(peer.owner, peer.version)
        try:
            self._dispatch(peer, message)
        except EdgedraftError as error:
            self.fault(peer, session_id, error)
        finally:
            self._metrics.count_uplink(peer, mode or self._mode_of(peer, session_id), size)

    def fault(self, peer: Peer, session_id: int | None, error: EdgedraftError) -> None:
        """Report an error to a peer and end the session it occurred in, if any."""
        log_fault(peer, session_id, error)
        if session_id is not None:
            self._sessions.drop(peer.owner, session_id)
        self._send_fault(peer, session_id, error)

    def drain(self) -> None:
        """Refuse new sessions; open ones continue."""
        self._draining = True

    def revoke(self, owner: str, name: str, error: EdgedraftError) -> None:
        """End all sessions of an owner, require another Hello, and drop the metrics of its name."""
        logger.warning("peer %s: %s", owner[:8], error)
        self._handshake.drop(owner)
        for session in self._sessions.of(owner):
            self._send_fault(session.peer, session.session_id, error)
            self._sessions.drop(owner, session.session_id)
        self._metrics.fleet.forget(name)

    def step(self) -> None:
        """One forward pass over what is ready: schedule, run, verify, deliver."""
        self._run(self._scheduler.schedule(self._sessions.all(), self._clock()))

    def drop_idle(self) -> None:
        """Drop sessions that have nothing to run and were not active for ``limits.idle_timeout`` seconds."""
        timeout = self._limits.idle_timeout
        oldest = self._clock() - timeout
        for session in self._sessions.all():
            if session.last_active < oldest and not session.waiting:
                logger.info("peer %s, session %s: idle for %d s, dropped", session.peer, session.session_id, timeout)
                self._sessions.drop(session.peer.owner, session.session_id)

    def close(self) -> None:
        """Tell every peer that the base station is shutting down."""
        error = ClosingError("the base station is shutting down")
        for session in self._sessions.all():
            self._send_fault(session.peer, session.session_id, error)
        self._sessions.clear()

    def _run(self, units: Sequence[ScheduledUnit]) -> None:
        if not units:
            return
        lengths = [unit.session.kv_cache.length for unit in units]
        start, gathered, out_of_memory = self._clock(), self._target.gathered, ""
        pass_clock = PassClock(self._target.torch_device, self._clock)
        pass_clock.mark()
        try:
            with catch_out_of_memory():
                logits = self._target.forward([unit.segment for unit in units])
                pass_clock.mark()
                results = verify_rounds(logits, [unit.round for unit in units if unit.round])
                pass_clock.mark()
                forward_seconds, verify_seconds = pass_clock.seconds()
        except OutOfMemory as error:
            out_of_memory = str(error)
        if out_of_memory:  # handled outside of the except clause, where the traceback would keep the pass's tensors
            for unit, length in zip(units, lengths, strict=True):
                unit.session.kv_cache.rollback(length)
            self._run_in_halves(units, out_of_memory)
            return
        end = self._clock()
        rounds = []
        verified = [(unit.session, unit.round) for unit in units if unit.round]
        for (session, one), result in zip(verified, results, strict=True):
            if result.finite and not session.grammar_error:
                rounds.append(self._conclude(session, one, result, start, end))
            else:
                self._fail_round(session)
        tokens = sum(len(unit.segment.token_ids) for unit in units)
        if tokens == sum(unit.segment.num_logits for unit in units):  # no prefill
            self._pass_times.observe(len(units), tokens, end - start)
        gathered = self._target.gathered - gathered
        self._record(PassRecord(len(units), tokens, gathered, forward_seconds, verify_seconds, rounds))

    def _fail_round(self, session: Session) -> None:
        """End a session whose round has no result."""
        where = f"in the round after {len(session.tokens)} tokens of this session"
        error: EdgedraftError = NonFiniteError(f"the target's logits are NaN or infinite {where}")
        if session.grammar_error:
            error = GrammarError(f"the grammar cannot be applied {where}: {session.grammar_error}")
        self.fault(session.peer, session.session_id, error)

    def _conclude(
        self, session: Session, one: RoundToVerify, result: VerificationResult, start: float, end: float
    ) -> VerifiedRound:
        """Commit a round and deliver its Verdict; ``start`` and ``end`` are the times of the pass.

        Tokens that were given, not drafted, count as neither drafted nor accepted.
        """
        queueing_delay = start - session.round_since
        drafted, accepted = (0, 0) if one.given else (session.round_len - 1, result.accepted)
        verdict = session.commit(result, end)
        self._deliver(session.peer, verdict, session)
        self._metrics.fleet.count_round(session.peer.name, drafted, accepted, queueing_delay)
        return VerifiedRound(
            session.peer.owner,
            verdict.session_id,
            verdict.round_id,
            session.mode,
            drafted,
            accepted,
            result.token_id,
            queueing_delay,
        )

    def _record(self, record: PassRecord) -> None:
        self._metrics.count_pass(record)
        if self._records:
            self._records.write(record)

    def _run_in_halves(self, units: Sequence[ScheduledUnit], reason: str) -> None:
        """Run a pass that ran out of memory in two halves.

        If one session alone runs out of memory, idle sessions' KV caches are evicted;
        if there are none, the session is refused.
        """
        self._metrics.count_out_of_memory()
        logger.warning("out of memory in a pass of %d sessions: %s", len(units), reason)
        if len(units) > 1:
            half = len(units) // 2
            self._run(units[:half])
            self._run(units[half:])
        elif self._scheduler.evict_idle(self._sessions.all()):
            self._run(units)
        else:
            self._refuse(units[0].session)

    def _refuse(self, session: Session) -> None:
        seconds = round(BUSY_SECONDS)
        error = FullError(f"the base station is out of memory; retry in {seconds} s", seconds)
        self.fault(session.peer, session.session_id, error)

    def _dispatch(self, peer: Peer, message: Message) -> None:
        match message:
            case Hello():
                self._greet(peer, message)
            case Open() | Draft() | Decode() | Extend():
                self._request(peer, message)
            case Resume():
                self._resume(peer, message)
            case Close():
                logger.info("peer %s, session %s: closed by the device", peer, message.session_id)
                self._grammars.forget(peer.owner, message.session_id)
                self._sessions.drop(peer.owner, message.session_id)
            case Fault():
                logger.warning("peer %s reports %s: %s", peer, message.code, message.text)
                self._metrics.fleet.faults.add(peer.name, message.code, message.text, reported=True)
                if message.session_id is not None:
                    self._grammars.forget(peer.owner, message.session_id)
                    self._sessions.drop(peer.owner, message.session_id)
            case _:
                raise StateError(f"{type(message).__name__} is sent by base stations only")

    def _greet(self, peer: Peer, hello: Hello) -> None:
        others = self._count_active(one for one in self._sessions.all() if one.peer.owner != peer.owner)
        self._deliver(peer, self._handshake.greet(peer.owner, hello, self._pass_times.pace(others)))

    def _count_active(self, sessions: Iterable[Session]) -> int:
        now = self._clock()
        return sum(is_active(one, now) for one in sessions)

    def _request(self, peer: Peer, request: Request) -> None:
        if not self._handshake.greeted(peer.owner):
            raise UnknownSessionError(f"{type(request).__name__} before Hello")
        if not self._grammars.ready(peer.owner, request, partial(self._receive_again, peer, request)):
            return
        session = self._sessions.get(peer.owner, request.session_id)
        if session is not None:
            session.touch(peer, self._clock())
            replies = self._continue(session, request)
        elif isinstance(request, Open):
            session, replies = self._open(peer, request)
        else:
            raise UnknownSessionError(f"session {request.session_id} is not open")
        for reply in replies:
            self._deliver(peer, reply, session)

    def _receive_again(self, peer: Peer, request: Request) -> None:
        """Take a request whose grammar was compiled meanwhile, unless its device's key was revoked meanwhile too."""
        if self._handshake.greeted(peer.owner):
            self.receive(peer, request)

    def _continue(self, session: Session, request: Request) -> list[Reply]:
        """Take a new request of an open session, or answer a repetition as far as its device's rate limit allows."""
        owner = session.peer.owner
        if session.is_new(request):
            self._sessions.check_memory(owner, request, session.reply_bytes(request))
            replies = session.take(request, self._grammars.get(request))
            if isinstance(request, Extend):
                self._scheduler.check_share(session, self._sessions.all(), self._clock())
            return replies
        replies = session.repeat(request, self._repetitions.left(owner))
        self._repetitions.allows(owner, len(replies))
        return replies

    def _open(self, peer: Peer, request: Open) -> tuple[Session, list[Reply]]:
        if self._draining:
            raise ClosingError("the base station is shutting down")
        target, now = self._target, self._clock()
        self._sessions.check_memory(peer.owner, request)
        kv_cache, stop_ids = target.new_kv_cache(), target.vocabulary.stop_ids
        session = Session(peer, request, kv_cache, stop_ids, target.context_length, self._limits.window, now)
        replies = session.take(request, self._grammars.get(request))
        replaced = self._sessions.replaceable(peer.owner, now)
        self._scheduler.admit(session, self._sessions.all(), now)
        self._sessions.add(session, replaced)
        prompt_len = len(request.prompt_ids)
        logger.info("peer %s, session %s: %s, %d tokens", peer, request.session_id, request.mode, prompt_len)
        return session, replies

    def _resume(self, peer: Peer, message: Resume) -> None:
        session = self._sessions.get(peer.owner, message.session_id)
        if session is None:
            raise UnknownSessionError(f"session {message.session_id} is not open")
        resumed = session.resume(message)
        session.touch(peer, self._clock())
        self._deliver(peer, resumed, session)

    def _note_eviction(self, session: Session) -> None:
        self._metrics.count_eviction()
        logger.info(
            "peer %s, session %s: evicted, with %d tokens", session.peer, session.session_id, len(session.tokens)
        )

    def _send_fault(self, peer: Peer, session_id: int | None, error: EdgedraftError) -> None:
        self._deliver(peer, counted_fault(peer, session_id, error, self._handshake, self._metrics))

    def _deliver(self, peer: Peer, message: Message, session: Session | None = None) -> None:
        size = self._send(peer.address, message)
        self._metrics.count_downlink(peer, session.mode if session else None, size)

    def _mode_of(self, peer: Peer, session_id: int | None) -> Mode | None:
        session = self._sessions.get(peer.owner, session_id)
        return session.mode if session else None
