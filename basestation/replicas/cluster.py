"""Replicas on one or several machines: Ray places them, and starts them again when they or their machine are lost.

Requests do not pass through Ray: they travel between front and replicas over ZeroMQ.
"""

import os
import secrets
import time
from collections.abc import Collection
from socket import create_connection
from types import TracebackType
from typing import Any, Self

import ray
from ray._private.state import state as ray_state
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.placement_group import placement_group_table as group_table

from basestation.launch_options import ClusterOptions, TargetOptions
from basestation.logs import LogFormat
from basestation.replicas.ray_actors import ReplicaActor, choose_weights, failure_of, place_of
from basestation.replicas.replica_settings import ReplicaSettings
from common.error_text import first_line
from protocol.errors import EdgedraftError, LinkError, SettingsError

_REACH_SECONDS = 5.0
_PLACE_SECONDS = 30.0
"""After which a replica that Ray has no room for is reported."""
_LOCAL_CPUS = 10_000
"""On one machine the operator's number of replicas is the bound, not Ray's count of cores."""
_OBJECT_STORE_BYTES = 100 * 2**20
"""Nothing is stored there; about the least that Ray accepts."""


class Cluster:
    """The replicas of a base station.

    Args:
        options: how many, and where.

    Attributes:
        local: whether all are on this machine.

    Raises:
        LinkError: there is no Ray cluster at the address.
    """

    def __init__(self, options: ClusterOptions) -> None:
        self.local = options.ray_address is None
        cores = os.cpu_count() or 1
        self._cpus = options.replica_cpus or max(1, cores // (options.replicas * options.ranks))
        self._groups: dict[str, Any] = {}
        self._actors: dict[str, Any] = {}
        self._started: dict[str, float] = {}
        self._serving: dict[Any, str] = {}
        try:
            self._connect(options)
        except (ConnectionError, RuntimeError) as error:
            reason = first_line(error)
            raise LinkError(f"no Ray cluster at {options.ray_address or 'this machine'}: {reason}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for name in list(self._actors):
            self.kill(name)
        ray.shutdown()

    @property
    def host(self) -> str:
        """The address of this machine for replicas."""
        return "127.0.0.1" if self.local else str(ray.util.get_node_ip_address())

    def start(self, settings: ReplicaSettings) -> None:
        """Start a replica, and start it again whenever it is lost."""
        name = settings.replica.name
        gpus = int(self.uses_gpu(settings.target.torch_device))
        strategy: Any = "SPREAD"
        if settings.ranks > 1:
            self._groups[name] = placement_group([{"CPU": self._cpus, "GPU": gpus}] * settings.ranks, strategy="PACK")
            strategy = place_of(self._groups[name], 0)
        actor = ray.remote(ReplicaActor).options(
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=strategy,
            num_cpus=self._cpus,
            num_gpus=gpus,
        )
        self._actors[name] = actor.remote()
        self._started[name] = time.monotonic()
        self._serving[self._actors[name].serve.remote(settings)] = name

    def choose_weights(self, target: TargetOptions, ranks: int, log_format: LogFormat) -> str:
        """What ``--weights auto`` is for all replicas: ``int8`` or ``dtype``, measured where one of them would run.

        Raises:
            SettingsError: an option has a wrong value.
            ModelError: the target cannot be served.
        """
        gpus = int(self.uses_gpu(target.torch_device))
        choose = ray.remote(choose_weights).options(num_cpus=self._cpus, num_gpus=gpus)
        try:
            return str(ray.get(choose.remote(target, ranks, log_format)))
        except RayTaskError as error:
            raise failure_of(error) from None

    def kill(self, name: str) -> None:
        """End a replica at once, and for good."""
        self._serving = {reference: of for reference, of in self._serving.items() if of != name}
        ray.kill(self._actors.pop(name))
        if name in self._groups:
            remove_placement_group(self._groups.pop(name))

    def wait(self, seconds: float) -> dict[str, EdgedraftError | None]:
        """Wait; returns the replicas that have ended, each with the reason why it cannot serve, None if it drained."""
        finished, _ = ray.wait(list(self._serving), timeout=seconds)
        ended = dict[str, EdgedraftError | None]()
        for reference in finished:
            name = self._serving[reference]
            try:
                ray.get(reference)
                ended[name] = None
            except RayError as error:
                ended[name] = failure_of(error)
            self.kill(name)  # so that another one can have its cores
        return ended

    @property
    def unplaced(self) -> Collection[str]:
        """The replicas that Ray has had no room for so far."""
        latest = time.monotonic() - _PLACE_SECONDS
        late = [name for name in self._actors if self._started[name] < latest]
        return [name for name in late if _state(self._actors[name]).get("State") == "PENDING_CREATION"]

    @property
    def on_draining_nodes(self) -> Collection[str]:
        """The replicas on nodes that are about to be removed: ``ray drain-node`` and autoscalers announce it."""
        draining = ray_state.get_draining_nodes()
        return [name for name in self._actors if self._nodes_of(name) & draining.keys()] if draining else []

    def uses_gpu(self, torch_device: str) -> bool:
        """Whether a replica runs on a GPU: ``auto`` does where Ray knows of one."""
        if torch_device == "auto":
            return bool(ray.cluster_resources().get("GPU", 0))
        return torch_device != "cpu"

    def _nodes_of(self, name: str) -> set[str]:
        """The nodes where a replica runs, or is placed."""
        if name in self._groups:
            return set(group_table(self._groups[name])["bundles_to_node_id"].values())
        return {_state(self._actors[name]).get("Address", {}).get("NodeID", "")}

    def _connect(self, options: ClusterOptions) -> None:
        shared = {"log_to_driver": True, "configure_logging": False, "namespace": "edgedraft"}
        if options.ray_address is not None:
            _check_reachable(options.ray_address)
            ray.init(options.ray_address, **shared)
            return
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray writes one to the home folder otherwise
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local = {"num_cpus": _LOCAL_CPUS, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        ray.init("local", **local, **shared)


def _state(actor: Any) -> dict[str, Any]:
    """What Ray knows of an actor."""
    return dict(ray_state.actor_table(actor._actor_id.hex()))


def _check_reachable(address: str) -> None:
    """Check that something listens there: Ray itself tries for a minute and then ends the process.

    Raises:
        SettingsError: ``address`` is not HOST:PORT.
        LinkError: nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise SettingsError("ray-address", address, "HOST:PORT")
    try:
        create_connection((host, int(port)), _REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise LinkError(f"no Ray cluster at {address}: {error}; start one with: ray start --head") from error
