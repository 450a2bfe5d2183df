"""The engine owns the target: it runs what has arrived in passes, and hands out replies.

Knows sessions and peers by name; touches no socket. ``step`` is one pass:
gather, run, judge, deliver.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from basestation.session import Session
from basestation.target_model import TargetModel
from protocol.errors import EdgedraftError, MismatchError, StateError, UnknownSessionError
from protocol.frames import FrameLimits
from protocol.messages import (
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
    Welcome,
)

Deliver: TypeAlias = Callable[[bytes, Message], None]

logger = logging.getLogger(__name__)


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
        limits: what the frames of this station may hold.
        deliver: called with an address and every message for it.
        idle_seconds: a session is forgotten when its device is silent for so long.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        target: TargetModel,
        limits: FrameLimits,
        deliver: Deliver,
        idle_seconds: float = 600,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target = target
        self._limits = limits
        self._deliver = deliver
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._greeted: set[str] = set()
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
        self._greeted.discard(owner)
        for key in [key for key in self._sessions if key[0] == owner]:
            self._deliver(self._sessions.pop(key).address, Fault(key[1], error.code, str(error)))

    def step(self) -> None:
        """One pass over every session that waits."""
        waiting = [session for session in self._sessions.values() if session.waiting]
        if not waiting:
            return
        logits = self._target.forward([session.segment() for session in waiting])
        for session, rows in zip(waiting, logits, strict=True):
            for reply in session.judge(rows):
                self._deliver(session.address, reply)

    def drop_idle(self) -> None:
        """Forget sessions whose device has been silent for ``idle_seconds``."""
        oldest = self._clock() - self._idle_seconds
        for key, session in list(self._sessions.items()):
            if session.heard_at < oldest:
                owner, session_id = key
                logger.info("peer %s, session %s: silent for %g s, dropped", owner[:8], session_id, self._idle_seconds)
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
        self._greeted.add(peer.owner)
        self._deliver(
            peer.address,
            Welcome(
                PROTOCOL_VERSION,
                self._target.name,
                self._target.context_length,
                self._limits.max_draft_len,
                tuple(Mode),
            ),
        )

    def _check_hello(self, hello: Hello) -> None:
        vocabulary = self._target.vocabulary
        if hello.version != PROTOCOL_VERSION:
            raise MismatchError(f"protocol version {hello.version}; this base station speaks {PROTOCOL_VERSION}")
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
            session = self._open(request)
            replies = session.take(request)
            self._sessions[peer.owner, request.session_id] = session
            prompt_len = len(request.prompt_ids)
            logger.info("peer %s, session %s: %s, %d tokens", peer, request.session_id, request.mode, prompt_len)
        else:
            replies = session.take(request)
        session.heard_at, session.address = self._clock(), peer.address
        for reply in replies:
            self._deliver(peer.address, reply)

    def _open(self, request: Open) -> Session:
        target = self._target
        return Session(request, target.new_stretch(), target.vocabulary.stop_ids, target.context_length)
