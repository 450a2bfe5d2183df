"""The open sessions of all devices, and how many and how much memory one device may have."""

import logging
from collections import Counter

from basestation.engine.load import SessionKey
from basestation.engine.scheduler import BUSY_SECONDS, is_busy
from basestation.sessions.held_bytes import held_bytes
from basestation.sessions.session import Session
from protocol.errors import FullError
from protocol.limits import Limits, option_name
from protocol.messages import Request

logger = logging.getLogger(__name__)


class SessionTable:
    """Sessions by owner and session id.

    Args:
        limits: of what an owner may have.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_owner: dict[str, dict[int, Session]] = {}

    def get(self, owner: str, session_id: int | None) -> Session | None:
        """An owner's session, if it is open."""
        return None if session_id is None else self._by_owner.get(owner, {}).get(session_id)

    def all(self) -> list[Session]:
        """The sessions of all owners."""
        return [session for sessions in self._by_owner.values() for session in sessions.values()]

    def of(self, owner: str) -> list[Session]:
        """All sessions of an owner."""
        return list(self._by_owner.get(owner, {}).values())

    def keys(self) -> list[SessionKey]:
        """Owner and session id of all sessions. Another thread may call it: it iterates over copies."""
        owned = self._by_owner.copy().items()
        return [(owner, session_id) for owner, sessions in owned for session_id in sessions.copy()]

    def add(self, session: Session, replaced: Session | None = None) -> None:
        """Add a session that was opened, and drop the one of its device that it replaces, if any."""
        if replaced:
            logger.info("peer %s, session %s: dropped, for another of its device", replaced.peer, replaced.session_id)
            self.drop(replaced.peer.owner, replaced.session_id)
        self._by_owner.setdefault(session.peer.owner, {})[session.session_id] = session

    def drop(self, owner: str, session_id: int) -> None:
        """Remove a session, if it is open, and free its KV cache."""
        sessions = self._by_owner.get(owner, {})
        if session := sessions.pop(session_id, None):
            session.kv_cache.release()
            if not sessions:
                del self._by_owner[owner]

    def clear(self) -> None:
        """Forget all sessions."""
        self._by_owner.clear()

    def replaceable(self, owner: str, now: float) -> Session | None:
        """The longest idle session of an owner that has as many as allowed, else None: a killed device closed none.

        Raises:
            FullError: all its sessions are active.
        """
        sessions, most = self.of(owner), self._limits.max_sessions
        if len(sessions) < most:
            return None
        idle = [one for one in sessions if not is_busy(one, now)]
        if not idle:
            option, seconds = option_name("max_sessions"), round(BUSY_SECONDS)
            raise FullError(
                f"{most} sessions of this device are active, all that {option} allows; retry in {seconds} s", seconds
            )
        return min(idle, key=lambda session: session.last_active)

    def check_memory(self, owner: str, request: Request, reply_bytes: int = 0) -> None:
        """Check that an owner's sessions may hold a new request and ``reply_bytes`` of its replies.

        Raises:
            LimitError: they would hold more bytes than ``limits.max_held_bytes``.
        """
        size = held_bytes(request) + reply_bytes
        if size:
            held = size + sum(session.held_bytes for session in self.of(owner))
            self._limits.check("max_held_bytes", held)

    def count_by_name(self) -> Counter[str]:
        """Open sessions by the name of their device. Another thread may call it: it iterates over copies."""
        owned = [sessions.copy() for sessions in self._by_owner.copy().values()]
        return Counter(session.peer.name for sessions in owned for session in sessions.values())
