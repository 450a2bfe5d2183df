"""Which replica each session is at: rendezvous hashing proposes one, load may override, and then it stays there.

Knows replicas by what they report, and no socket.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field

from basestation.devices.peer import Peer
from basestation.engine.load import Load, SessionKey
from basestation.replicas.inner_messages import Report

_SILENT_SECONDS = 3.0
"""After which a replica that reports nothing counts as lost."""
_SETTLED_SECONDS = 5.0
"""A route that a replica does not report is kept for so long: its session may not be open yet."""
_MOST_RELATIVE_LOAD = 2
_MOST_MORE_LOAD = 4
"""A replica is overloaded where it has more sessions than twice the least loaded one's, and 4."""
_FULL_KV_SHARE = 0.9


@dataclass(slots=True)
class KnownReplica:
    """A replica as the front knows it.

    Attributes:
        identity: of its connection; another one after each start.
        name: the same after each start.
        heard_at: when it last reported, in seconds.
        load: as it last reported.
        opened: sessions routed to it since then.
        draining: whether it opens no more sessions.
    """

    identity: bytes
    name: str
    heard_at: float
    load: Load = field(default_factory=Load)
    opened: int = 0
    draining: bool = False

    @property
    def sessions(self) -> int:
        """Open sessions, and those that are about to be."""
        return len(self.load.sessions) + self.opened


@dataclass(slots=True)
class Route:
    """Where a session is; ``peer`` is the device as it was last seen, None if it was not since the front started."""

    replica: bytes
    routed_at: float
    peer: Peer | None = None


class Routing:
    """The live replicas, and the sessions at each.

    Attributes:
        replicas: by identity.
    """

    def __init__(self) -> None:
        self.replicas: dict[bytes, KnownReplica] = {}
        self._routes: dict[SessionKey, Route] = {}

    @property
    def names(self) -> Collection[str]:
        """The names of the live replicas."""
        return [one.name for one in self.replicas.values()]

    def update(self, identity: bytes, report: Report, now: float) -> None:
        """Take a report: the replica's sessions are routed to it, unless they were opened elsewhere since."""
        known = self.replicas.setdefault(identity, KnownReplica(identity, report.name, now))
        known.heard_at, known.load, known.opened = now, report.load, 0
        known.draining |= report.draining  # the report may be older than the front's command
        reported = set(report.load.sessions)
        for key in reported:
            self._routes.setdefault(key, Route(identity, now))
        oldest = now - _SETTLED_SECONDS
        for key, route in list(self._routes.items()):
            if route.replica == identity and key not in reported and route.routed_at < oldest:
                del self._routes[key]

    def drop(self, identity: bytes) -> list[tuple[SessionKey, Route]]:
        """Forget a lost replica; returns the sessions that were there."""
        self.replicas.pop(identity, None)
        lost = [(key, route) for key, route in self._routes.items() if route.replica == identity]
        for key, _ in lost:
            del self._routes[key]
        return lost

    def silent(self, now: float) -> list[bytes]:
        """The replicas that have not reported for long."""
        return [one.identity for one in self.replicas.values() if one.heard_at < now - _SILENT_SECONDS]

    def route(self, key: SessionKey) -> Route | None:
        """Where a session is, if it is open."""
        return self._routes.get(key)

    def open(self, key: SessionKey, now: float) -> Route | None:
        """Choose a replica for a new session; None if none opens sessions."""
        open_ones = [one for one in self.replicas.values() if not one.draining]
        if not open_ones:
            return None
        chosen = _choose(key[0], open_ones)
        chosen.opened += 1
        self._routes[key] = route = Route(chosen.identity, now)
        return route

    def proposed(self, owner: str) -> KnownReplica | None:
        """The replica that new sessions of an owner go to unless it is overloaded."""
        return max(self.replicas.values(), key=lambda one: _score(owner, one), default=None)


def _choose(owner: str, replicas: Collection[KnownReplica]) -> KnownReplica:
    """The replica with the highest hash among those that are not overloaded."""
    roomy = [one for one in replicas if one.load.kv_share < _FULL_KV_SHARE] or replicas
    most = _MOST_RELATIVE_LOAD * min(one.sessions for one in roomy) + _MOST_MORE_LOAD
    return max((one for one in roomy if one.sessions <= most), key=lambda one: _score(owner, one))


def _score(owner: str, replica: KnownReplica) -> bytes:
    """Rendezvous hashing: a lost replica's owners spread over the others, and nobody else's replica changes."""
    return hashlib.sha256(f"{owner} {replica.name}".encode()).digest()
