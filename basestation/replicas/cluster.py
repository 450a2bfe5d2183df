"""Replicas on one or several machines: Ray places them, and starts them again when they or their machine are lost.

The only module that imports Ray. Requests do not pass through it: they travel between
front and replicas over ZeroMQ.
"""

import logging
import os
import secrets
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from socket import create_connection
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import psutil
import ray
from ray._private.state import state as ray_state
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import get_current_placement_group, placement_group, remove_placement_group
from ray.util.placement_group import placement_group_table as group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from basestation.devices.device_socket import check_endpoint
from basestation.launch_options import ClusterOptions, OperationOptions, SocketOptions, TargetOptions
from basestation.logs import LogFormat, start_logging
from basestation.replicas.control import Control, Scale, control_file
from basestation.replicas.front import FrontOptions
from basestation.replicas.front_process import FrontProcess, FrontSettings
from basestation.replicas.inner_link import InnerKey
from basestation.replicas.replica_set import ReplicaSet
from basestation.replicas.replica_settings import ReplicaOptions, ReplicaSettings
from basestation.sizes import parse_size
from basestation.stop_signals import stop_on_signals
from common.container_memory import within_limits
from common.error_text import first_line
from protocol.errors import EdgedraftError, LinkError, ModelError, SettingsError
from protocol.limits import Limits

if TYPE_CHECKING:
    from basestation.target.ranks import FirstRank, RankAddress  # imports PyTorch

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 0.5
_STOP_SECONDS = 5.0
_REACH_SECONDS = 5.0
_PLACE_SECONDS = 30.0
"""After which a replica that Ray has no room for is reported."""
_LOCAL_CPUS = 10_000
"""On one machine the operator's number of replicas is the bound, not Ray's count of cores."""
_OBJECT_STORE_BYTES = 100 * 2**20
"""Nothing is stored there; about the least that Ray accepts."""
_LOCAL_KV_SHARE = 4
"""All replicas of one machine may fill this fraction of its free memory with KV caches, where no size is given."""


class ReplicaActor:
    """What Ray runs in the process of a replica, or of its rank 0."""

    def serve(self, settings: ReplicaSettings) -> None:
        """Serve until drained. Ray calls it again in the process that replaces a lost one.

        Raises:
            ModelError: the target cannot be served; another process could not either.
        """
        from basestation.launcher import run_replica

        with _ending(settings.replica.name):
            run_replica(settings, _first_rank(settings) if settings.ranks > 1 else None)


class FollowerActor:
    """What Ray runs in the process of another rank of a replica."""

    def follow(self, settings: ReplicaSettings, rank: int, address: "RankAddress") -> None:
        """Follow rank 0 until it stops.

        Raises:
            ModelError: the share cannot be loaded; another process could not either.
        """
        from basestation.launcher import run_follower

        with _ending(f"rank {rank} of {settings.replica.name}"):
            run_follower(settings, rank, address)


def _choose_weights(target: TargetOptions, ranks: int, log_format: LogFormat) -> str:
    """What Ray runs in a process like that of a replica: decide what ``--weights auto`` is."""
    from basestation.launcher import choose_weights

    start_logging(log_format)
    try:
        return choose_weights(target, ranks)
    except EdgedraftError as error:  # of a type that can be sent to the parent
        raise ModelError(str(error)) from None


class Followers:
    """The other ranks of a replica, as its rank 0 starts and watches them.

    Where one is lost, the process of rank 0 ends, and Ray starts that again. Where rank 0 is lost, Ray ends its
    followers: an actor ends with the process that started it.

    Args:
        settings: of the replica, whose ranks have a placement group.
        address: of rank 0.
    """

    def __init__(self, settings: ReplicaSettings, address: "RankAddress") -> None:
        self._name = settings.replica.name
        self._failure: ModelError | None = None
        group = get_current_placement_group()
        self._actors = [_follower(group, rank) for rank in range(1, settings.ranks)]  # Ray ends forgotten actors
        running = [actor.follow.remote(settings, rank, address) for rank, actor in enumerate(self._actors, 1)]
        threading.Thread(target=self._watch, args=(running,), name="followers", daemon=True).start()

    def check(self) -> None:
        """Raise what keeps a follower from loading its share."""
        if self._failure is not None:
            raise self._failure

    def _watch(self, running: list[Any]) -> None:
        while running:
            (ended, *_), running = ray.wait(running)
            try:
                ray.get(ended)
            except RayTaskError as error:
                self._failure = ModelError(str(error.cause))
            except RayError as error:
                reason = first_line(error)
                logger.critical("%s ends, for another process to replace it: %s", self._name, reason)
                os._exit(1)


@contextmanager
def _ending(name: str) -> Iterator[None]:
    """End the process if the code in this context fails.

    Raises:
        ModelError: it fails in a way that another process would too.
    """
    try:
        yield
    except EdgedraftError as error:
        raise ModelError(f"{name}: {error}") from None
    except Exception:
        logger.exception("%s ends, for another process to replace it", name)
        os._exit(1)


def _first_rank(settings: ReplicaSettings) -> "FirstRank":
    """Rank 0 of a replica, whose followers start now."""
    from basestation.target.ranks import FirstRank, address_towards

    first = FirstRank(settings.ranks, address_towards(settings.replica.front), settings.replica.inner_key)
    first.check = Followers(settings, first.address).check
    return first


def _follower(group: Any, rank: int) -> Any:
    """The actor of a follower, with the resources that the placement group has for it."""
    resources = group.bundle_specs[rank]
    options = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0)}
    return ray.remote(FollowerActor).options(scheduling_strategy=_place_of(group, rank), **options).remote()


def _place_of(group: Any, rank: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)


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
            strategy = _place_of(self._groups[name], 0)
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
            ModelError: the target cannot be served.
        """
        gpus = int(self.uses_gpu(target.torch_device))
        choose = ray.remote(_choose_weights).options(num_cpus=self._cpus, num_gpus=gpus)
        try:
            return str(ray.get(choose.remote(target, ranks, log_format)))
        except RayTaskError as error:
            raise ModelError(str(error.cause)) from None

    def kill(self, name: str) -> None:
        """End a replica at once, and for good."""
        self._serving = {reference: of for reference, of in self._serving.items() if of != name}
        ray.kill(self._actors.pop(name))
        if name in self._groups:
            remove_placement_group(self._groups.pop(name))

    def wait(self, seconds: float) -> dict[str, str]:
        """Wait; returns the replicas that have ended, each with the reason why it cannot serve, "" if it drained."""
        finished, _ = ray.wait(list(self._serving), timeout=seconds)
        ended = {}
        for reference in finished:
            name = self._serving[reference]
            try:
                ray.get(reference)
                ended[name] = ""
            except RayError as error:
                ended[name] = str(getattr(error, "cause", None) or error)
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
        raise SettingsError("ray_address", address, "HOST:PORT")
    try:
        create_connection((host, int(port)), _REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise LinkError(f"no Ray cluster at {address}: {error}; start one with: ray start --head") from error


def serve_replicas(
    target: TargetOptions, socket: SocketOptions, operation: OperationOptions, options: ClusterOptions
) -> None:
    """Serve with replicas behind a front until SIGINT or SIGTERM; the second lets open sessions finish."""
    check_endpoint(socket.bind, socket.keys, socket.insecure)
    key = InnerKey.new()
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(options))
        listening = FrontOptions(socket.bind, f"tcp://{cluster.host}:0", key, options.replicas, socket.limits)
        front = stack.enter_context(closing(FrontProcess(_front_settings(listening, target, socket, operation))))
        inner_address = front.start()
        target = replace(target, kv_memory=_kv_memory(target, cluster, options.replicas * options.ranks))
        if target.weights == "auto":  # replicas would not all find the same one faster
            target = replace(target, weights=cluster.choose_weights(target, options.ranks, operation.log_format))
        stop_on_signals(front.drain, lambda: front.draining, operation.drain_seconds)

        def start(name: str) -> None:
            replica = ReplicaOptions(name, inner_address, key, socket.keys is not None)
            cluster.start(_replica_settings(target, socket.limits, operation, replica, options.ranks))

        def drain(name: str) -> None:
            front.drain(operation.drain_seconds, name)

        replicas = ReplicaSet(start, drain, cluster.kill)
        replicas.scale(options.replicas)
        _operate(cluster, front, replicas, stack)
        if front.failure:
            raise LinkError(front.failure)
    logger.info("stopped")


def _operate(cluster: Cluster, front: FrontProcess, replicas: ReplicaSet, stack: ExitStack) -> None:
    """Do what operators and lost machines ask for, until the front or all replicas have ended.

    Raises:
        ModelError: no replica can serve.
    """
    control, is_reachable = None, True
    while front.running and replicas.running:
        for name, failure in cluster.wait(_WAIT_SECONDS).items():
            replicas.remove(name, failure)
        front.expect(len(replicas.running))
        if front.draining or not front.serving:
            continue
        if control is None and is_reachable:
            control = _control(stack, front.bind)
            is_reachable = control is not None
        for request in control.requests() if control else ():
            replicas.scale(request.replicas) if isinstance(request, Scale) else replicas.restart()
        replicas.replace(cluster.on_draining_nodes)
        refused = [*front.refused()]  # before the replicas, of which the front told first
        replicas.step(front.replicas, cluster.unplaced)
        for name, reason in refused:
            replicas.refuse(name, reason)


def _control(stack: ExitStack, bind: str) -> Control | None:
    """How ``scale`` and ``restart`` reach this base station; None where its file cannot be made."""
    try:
        return stack.enter_context(closing(Control(control_file(bind))))
    except LinkError as error:
        logger.warning("scale and restart cannot reach this base station: %s", error)
        return None


def _front_settings(
    listening: FrontOptions, target: TargetOptions, socket: SocketOptions, operation: OperationOptions
) -> FrontSettings:
    peer_bytes = parse_size("peer-memory", target.peer_memory)
    watched = operation.metrics_bind, operation.log_format
    return FrontSettings(listening, target.model, socket.keys, socket.insecure, peer_bytes, *watched)


def _replica_settings(
    target: TargetOptions, limits: Limits, operation: OperationOptions, replica: ReplicaOptions, ranks: int
) -> ReplicaSettings:
    """The settings of one replica; it has files of its own."""
    record, profile = (_own_file(path, replica.name) for path in (operation.record, operation.profile))
    return ReplicaSettings(target, limits, replica, record, profile, operation.log_format, ranks)


def _own_file(path: Path | None, name: str) -> Path | None:
    return path.resolve().with_name(f"{path.stem}.{name}{path.suffix}") if path else None


def _kv_memory(target: TargetOptions, cluster: Cluster, processes: int) -> str:
    """The option, or the share of each process with a target where all are on the CPU of this machine."""
    if target.kv_memory != "auto" or not cluster.local or cluster.uses_gpu(target.torch_device):
        return target.kv_memory
    return str(within_limits(psutil.virtual_memory().available) // (_LOCAL_KV_SHARE * processes))
