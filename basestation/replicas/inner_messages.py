"""What the front and its replicas tell each other, as the parts of ZeroMQ messages.

From the front: a head that starts with a ``Command``, and for a REQUEST the device's frame.
From a replica: a device's address and a frame for it, or an empty address and a ``Report``.
"""

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum

from basestation.devices.peer import Peer
from basestation.engine.load import Load
from basestation.engine.pace import Pace
from basestation.monitoring.fault_log import LoggedFault
from basestation.target.served_target import ServedTarget


class Command(IntEnum):
    """The first byte of the front's messages."""

    REQUEST = 1
    """A device's frame; the head has its peer."""
    REVOKE = 2
    """End the sessions of the head's peer, whose key was revoked."""
    DESCRIBE = 3
    """Report the target too."""
    DRAIN = 4
    """Open no more sessions, and stop after the seconds in the head."""
    PROBE = 5
    """Nothing: where it cannot be sent, the replica is gone."""

    def head(self, content: bytes = b"") -> bytes:
        """The head of a message with this command."""
        return bytes([self]) + content


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica tells the front of itself, each second.

    Attributes:
        name: stays the same when the replica is started again.
        load: its sessions and what else routing asks.
        draining: whether it opens no more sessions.
        target: only in the answer to DESCRIBE.
        metrics: as Prometheus scrapes them.
        faults: the latest.
    """

    name: str
    load: Load
    draining: bool = False
    target: ServedTarget | None = None
    metrics: str = ""
    faults: Sequence[LoggedFault] = ()

    def encode(self) -> bytes:
        """The report as JSON."""
        load = self.load
        fields = {
            "name": self.name,
            "sessions": load.sessions,
            "kv_share": load.kv_share,
            "pace": (load.pace.pass_seconds, load.pace.row_seconds),
            "draining": self.draining,
            "target": self.target.encode().decode() if self.target else "",
            "metrics": self.metrics,
            "faults": [astuple(fault) for fault in self.faults],
        }
        return json.dumps(fields).encode()

    @classmethod
    def decode(cls, text: bytes) -> "Report":
        """The report that ``encode`` wrote."""
        fields = json.loads(text)
        sessions = [(owner, session_id) for owner, session_id in fields["sessions"]]
        load = Load(sessions, fields["kv_share"], Pace(*fields["pace"]))
        target = ServedTarget.decode(fields["target"].encode()) if fields["target"] else None
        faults = tuple(LoggedFault(*fault) for fault in fields["faults"])
        return cls(fields["name"], load, fields["draining"], target, fields["metrics"], faults)


def encode_peer(peer: Peer) -> bytes:
    """A peer as the content of a head."""
    return bytes([peer.version, len(peer.address)]) + peer.address + f"{peer.owner} {peer.name}".encode()


def decode_peer(content: bytes) -> Peer:
    """The peer that ``encode_peer`` wrote."""
    version, size = content[:2]
    owner, name = content[2 + size :].decode().split(" ", 1)
    return Peer(owner, content[2 : 2 + size], name, version)
