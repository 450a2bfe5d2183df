"""What a replica's process is given: plain values, without PyTorch."""

from dataclasses import dataclass
from pathlib import Path

from basestation.launch_options import TargetOptions
from basestation.logs import LogFormat
from basestation.replicas.inner_link import InnerKey
from protocol.limits import Limits


@dataclass(frozen=True)
class ReplicaOptions:
    """How a replica reaches its front.

    Attributes:
        name: stays the same when the replica is started again.
        front: the endpoint of its inner link.
        inner_key: that the front has too.
        keyed: whether devices have keys.
    """

    name: str
    front: str
    inner_key: InnerKey
    keyed: bool


@dataclass(frozen=True)
class ReplicaSettings:
    """What a replica's process is given.

    Attributes:
        target: that it loads.
        limits: the same as the front's.
        replica: how it reaches the front.
        record: a file for its rounds.
        profile: a file for its trace.
        log_format: of its log.
        ranks: over which the target is split.
    """

    target: TargetOptions
    limits: Limits
    replica: ReplicaOptions
    record: Path | None
    profile: Path | None
    log_format: LogFormat
    ranks: int
