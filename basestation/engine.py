"""The engine owns the target: it runs what has arrived in passes, and hands out replies.

Knows sessions and peers by name; touches no socket. ``step`` is one pass:
gather, run, judge, deliver.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from basestation.session import Session
from basestation.target_model import TargetModel
from basestation.verify import judge_rounds
from protocol.errors import EdgedraftError, MismatchError, StateError, UnknownSessionError
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

Deliver: TypeAlias = Callable[[bytes, Message], None]

logger = logging.getLogger(__name__)

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
        deliver: called with an address and every message for it.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        target: TargetModel,
        limits: Limits,
        deliver: Deliver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target = target
        self._limits = limits
        self._deliver = deliver
        self._clock = clock
        self._greeted: dict[str, None] = {}
        self._sessions: dict[tuple[str, int], Session] = {}

    @property
    def busy(self) -> bool:
        """Whether a pass has anything to do."""
        return any(session.waiting for session in self._sessions.values())

    def receive(self, peer: Peer, message: Message) -> None:
        """Take a message; whatever is wrong with it ends that session alone, with a Fault (invariant 7)."""
        try:
            self._dispatch(peer, message)
        except EdgedraftError as error:
            self.fault(peer, getattr(message, "session_id", None), error)

    def fault(self, peer: Peer, session_id: int | None, error: EdgedraftError) -> None:
        """Tell a peer what it did wrong, and end the session it did it in."""
        logger.warning("peer %s, session %s: %s", peer, session_id, error)
        if session_id is not None:
            self._sessions.pop((peer.owner, session_id), None)
        self._deliver(peer.address, Fault(session_id, error.code, str(error)))

    def expel(self, owner: str, error: EdgedraftError) -> None:
        """End all sessions of an owner, who has to greet again."""
        logger.warning("peer %s: %s", owner[:8], error)
        self._greeted.pop(owner, None)
        for key in [key for key in self._sessions if key[0] == owner]:
            self._deliver(self._sessions.pop(key).address, Fault(key[1], error.code, str(error)))

    def step(self) -> None:
        """One pass over every session that waits."""
        waiting = [session for session in self._sessions.values() if session.waiting]
        if not waiting:
            return
        segments = [session.segment() for session in waiting]
        logits = self._target.forward(segments)
        judged = [session for session, segment in zip(waiting, segments, strict=True) if segment.judged]
        judgements = judge_rounds(logits, [session.round for session in judged])
        for session, judgement in zip(judged, judgements, strict=True):
            self._deliver(session.address, session.commit(judgement))

    def drop_idle(self) -> None:
        """Forget sessions whose device has been silent for ``limits.keep_seconds``."""
        kept = self._limits.keep_seconds
        oldest = self._clock() - kept
        for key, session in list(self._sessions.items()):
            if session.heard_at < oldest:
                owner, session_id = key
                logger.info(
                    "peer %s, session %s: silent for %d s, dropped", owner[:8], session_id, self._limits.keep_seconds
                )
                del self._sessions[key]

    def close(self) -> None:
        """Tell every peer that the base station goes away."""
        for (_, session_id), session in self._sessions.items():
            self._deliver(session.address, Fault(session_id, "closing", "the base station is shutting down"))
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
                self._sessions.pop((peer.owner, message.session_id), None)
            case Fault():
                logger.warning("peer %s reports %s: %s", peer, message.code, message.text)
                if message.session_id is not None:
                    self._sessions.pop((peer.owner, message.session_id), None)
            case _:
                raise StateError(f"{type(message).__name__} is for devices; a base station sends it")

    def _greet(self, peer: Peer, hello: Hello) -> None:
        self._check_hello(hello)
        self._greeted.pop(peer.owner, None)
        self._greeted[peer.owner] = None
        if len(self._greeted) > _MAX_GREETED:
            del self._greeted[next(iter(self._greeted))]
        limits = self._limits
        welcome = Welcome(
            min(hello.version, PROTOCOL_VERSION),
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
            self._sessions[peer.owner, request.session_id] = session
            prompt_len = len(request.prompt_ids)
            logger.info("peer %s, session %s: %s, %d tokens", peer, request.session_id, request.mode, prompt_len)
        else:
            replies = session.take(request)
        session.heard_at, session.address = self._clock(), peer.address
        for reply in replies:
            self._deliver(peer.address, reply)

    def _open(self, peer: Peer, request: Open) -> Session:
        self._limits.check("max_sessions", 1 + sum(owner == peer.owner for owner, _ in self._sessions))
        target = self._target
        return Session(
            request, target.new_stretch(), target.vocabulary.stop_ids, target.context_length, self._limits.window
        )

    def _resume(self, peer: Peer, message: Resume) -> None:
        session = self._sessions.get((peer.owner, message.session_id))
        if session is None:
            raise UnknownSessionError(f"session {message.session_id} is not open")
        self._deliver(peer.address, session.resume(message))
        session.heard_at, session.address = self._clock(), peer.address
