"""Serving with replicas behind a front: start both, and do what operators and lost machines require."""

import logging
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import psutil

from basestation.devices.device_socket import check_endpoint
from basestation.launch_options import ClusterOptions, OperationOptions, SocketOptions, TargetOptions
from basestation.replicas.cluster import Cluster
from basestation.replicas.control import Control, Scale, control_file
from basestation.replicas.front import FrontOptions
from basestation.replicas.front_process import FrontProcess, FrontSettings
from basestation.replicas.inner_link import InnerKey
from basestation.replicas.replica_set import ReplicaSet
from basestation.replicas.replica_settings import ReplicaOptions, ReplicaSettings
from basestation.sizes import parse_kv_memory, parse_size
from basestation.stop_signals import stop_on_signals
from common.container_memory import within_limits
from protocol.errors import LinkError
from protocol.limits import Limits

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 0.5
_LOCAL_KV_SHARE = 4
"""All replicas of one machine may fill this fraction of its free memory with KV caches, where no size is given."""


def serve_replicas(
    target: TargetOptions, socket: SocketOptions, operation: OperationOptions, options: ClusterOptions
) -> None:
    """Serve with replicas behind a front until SIGINT or SIGTERM; the second lets open sessions finish."""
    parse_kv_memory(target.kv_memory)  # before anything starts
    parse_size("peer-memory", target.peer_memory)
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
            raise front.failure
    logger.info("stopped")


def _operate(cluster: Cluster, front: FrontProcess, replicas: ReplicaSet, stack: ExitStack) -> None:
    """Do what operators and lost machines ask for, until the front or all replicas have ended.

    Raises:
        EdgedraftError: no replica can serve.
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
