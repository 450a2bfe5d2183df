"""What ``serve`` is told, in groups; plain values that another process can be given.

Imports no PyTorch: the processes that only route do not need it.
"""

from dataclasses import dataclass
from pathlib import Path

from basestation.devices.key_folder import KeyFolder
from basestation.logs import LogFormat
from protocol.errors import SettingsError
from protocol.limits import Limits


@dataclass(frozen=True)
class TargetOptions:
    """Which target is loaded, on which device, and with which budgets; None selects the default."""

    model: str
    dtype: str
    weights: str
    torch_device: str
    kv_memory: str
    use_cache: bool
    peer_memory: str
    pass_tokens: int | None
    prompt_tokens: int | None
    cuda_graphs: bool


@dataclass(frozen=True)
class SocketOptions:
    """Where a base station listens, and which devices it admits."""

    bind: str
    keys: KeyFolder | None
    insecure: bool
    limits: Limits


@dataclass(frozen=True)
class OperationOptions:
    """What an operator watches, and how the base station stops."""

    metrics_bind: str | None
    record: Path | None
    profile: Path | None
    drain_seconds: float
    log_format: LogFormat


@dataclass(frozen=True)
class ClusterOptions:
    """How many replicas there are, and where.

    Attributes:
        replicas: engines, each with its own target.
        ray_address: of a running Ray cluster; None starts one on this machine.
        replica_cpus: cores of each rank of a replica; None for this machine's, divided by all ranks.
        ranks: processes over which each replica's target is split.
    """

    replicas: int
    ray_address: str | None
    replica_cpus: int | None
    ranks: int = 1

    @classmethod
    def of(
        cls, replicas: int | None, ray_address: str | None, replica_cpus: int | None, tensor_parallel: int | None
    ) -> "ClusterOptions | None":
        """The options of a base station with replicas; None of one without.

        Raises:
            SettingsError: an option has no effect without replicas.
        """
        if replicas is not None:
            return cls(replicas, ray_address, replica_cpus, tensor_parallel or 1)
        given = {"ray-address": ray_address, "replica-cpus": replica_cpus, "tensor-parallel": tensor_parallel}
        for name, value in given.items():
            if value is not None:
                raise SettingsError(name, value, "left out without --replicas")
        return None
