"""Running a base station in one process, or the engine of a replica: load the target and serve until told to stop."""

import logging
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from prometheus_client import disable_created_metrics

from basestation.descriptors import raise_descriptor_limit
from basestation.devices.device_socket import check_endpoint
from basestation.engine.engine_host import PassOptions
from basestation.engine.pass_records import PassRecordFile
from basestation.engine.profiler import PassProfiler
from basestation.engine.scheduler import PassBudget
from basestation.kv_cache.heap import share_one_heap
from basestation.kv_cache.memory import free_memory
from basestation.kv_cache.memory_guard import MemoryGuard
from basestation.launch_options import OperationOptions, SocketOptions, TargetOptions
from basestation.logs import start_logging
from basestation.monitoring.metrics import Metrics
from basestation.monitoring.monitor import Monitor
from basestation.replicas.replica import Replica
from basestation.replicas.replica_settings import ReplicaSettings
from basestation.server import Server
from basestation.sizes import parse_size, readable_size
from basestation.stop_signals import stop_on_signals
from basestation.target.int8_conversion import uses_int8
from basestation.target.placement import choose_placement
from basestation.target.pretrained import read_config
from basestation.target.ranks import FirstRank, Follower, RankAddress, Ranks
from basestation.target.target_model import TargetModel
from basestation.target.tensor_parallel import Share

logger = logging.getLogger(__name__)


def run_base_station(target: TargetOptions, socket: SocketOptions, operation: OperationOptions) -> None:
    """Serve until SIGINT or SIGTERM; the second lets open sessions finish."""
    share_one_heap()
    raise_descriptor_limit()
    # Without it, each counter has a second series with the time it began.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    peer_bytes = parse_size("peer-memory", target.peer_memory)
    check_endpoint(socket.bind, socket.keys, socket.insecure)
    metrics = Metrics()
    with ExitStack() as stack:
        metrics_bind, keys = operation.metrics_bind, socket.keys
        monitor = stack.enter_context(closing(Monitor(metrics_bind, metrics, keys))) if metrics_bind else None
        records, profiler = _watchers(stack, operation.record, operation.profile)
        model = _load(target, metrics)
        kv_bytes = model.kv_bytes if model.torch_device.type == "cpu" else 0
        guard = MemoryGuard.of_process(kv_bytes, peer_bytes)
        watched = _budget(target, model), metrics, records, profiler, guard
        server = Server(model, socket.bind, socket.limits, keys, socket.insecure, *watched)
        stop_on_signals(server.stop, lambda: server.draining, operation.drain_seconds)
        if monitor:
            monitor.alive, monitor.ready = (lambda: server.alive), (lambda: not server.draining)
            logger.info("fleet page at %s/, metrics at %s/metrics", monitor.url, monitor.url)
        logger.info("serving %s at %s", target.model, server.address)
        server.serve()
    logger.info("stopped")


def run_replica(settings: ReplicaSettings, ranks: FirstRank | None = None) -> None:
    """Serve behind a front until it says otherwise.

    Args:
        settings: of the replica.
        ranks: over which the target is split; this process is rank 0.
    """
    start_logging(settings.log_format)
    share_one_heap()
    disable_created_metrics()  # type: ignore[no-untyped-call]
    metrics = Metrics()
    with ExitStack() as stack:
        records, profiler = _watchers(stack, settings.record, settings.profile)
        model = _load(settings.target, metrics, ranks)
        passes = PassOptions(_budget(settings.target, model), metrics, records, profiler)
        logger.info("replica %s serves %s", settings.replica.name, settings.target.model)
        Replica(model, settings.limits, settings.replica, passes).serve()
        if ranks:
            ranks.close()
    logger.info("replica %s stopped", settings.replica.name)


def run_follower(settings: ReplicaSettings, rank: int, address: RankAddress) -> None:
    """Run a share of the passes of a replica's target, until its rank 0 stops."""
    start_logging(settings.log_format)
    share_one_heap()
    follower = Follower(Share(rank, settings.ranks), address, settings.replica.inner_key)
    _load(settings.target, Metrics(), follower)
    logger.info("rank %d of %s follows", rank, settings.replica.name)
    follower.follow()
    follower.close()


def choose_weights(target: TargetOptions, ranks: int) -> str:
    """What ``--weights auto`` is on this machine: ``int8`` or ``dtype``."""
    placement, config = choose_placement(target.torch_device), read_config(target.model, ranks)
    return "int8" if uses_int8(config, target.weights, target.dtype, placement, ranks) else "dtype"


def _watchers(
    stack: ExitStack, record: Path | None, profile: Path | None
) -> tuple[PassRecordFile | None, PassProfiler | None]:
    """The record file and the profiler, open as long as the stack."""
    records = stack.enter_context(closing(PassRecordFile(record))) if record else None
    return records, (stack.enter_context(PassProfiler(profile)) if profile else None)


def _load(options: TargetOptions, metrics: Metrics, ranks: Ranks | None = None) -> TargetModel:
    """Load the target, and say where it runs."""
    logger.info("loading %s", options.model)
    where = options.dtype, options.torch_device, options.kv_memory
    how = options.use_cache, options.weights, options.cuda_graphs
    model = TargetModel.load(options.model, *where, *how, ranks)
    told = ", ".join(f"{name} {value}" for name, value in model.placement.items())
    logger.info("target: %s; free memory: %s", told, readable_size(free_memory(model.torch_device)))
    metrics.describe_target(model.placement, partial(free_memory, model.torch_device))
    logger.info("KV pool: %d positions", model.kv_pool.capacity)
    return model


def _budget(options: TargetOptions, model: TargetModel) -> PassBudget:
    return PassBudget.of(options.pass_tokens, options.prompt_tokens, model.torch_device.type == "cuda")
