"""Running a base station: load the target, open the socket and the monitor, serve until a signal."""

import logging
import resource
import signal
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prometheus_client import disable_created_metrics

from basestation.key_folder import KeyFolder
from basestation.memory import free_memory, parse_size, readable_size, share_one_heap
from basestation.memory_guard import MemoryGuard
from basestation.metrics import Metrics
from basestation.monitor import Monitor
from basestation.pass_records import PassRecordFile
from basestation.profiler import PassProfiler
from basestation.scheduler import PassBudget
from basestation.server import Server
from basestation.target_model import TargetModel
from protocol.limits import Limits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetOptions:
    """Which target is loaded, on which device, and with which budgets; None selects the default."""

    model: str
    dtype: str
    torch_device: str
    kv_memory: str
    use_cache: bool
    peer_memory: str
    pass_tokens: int | None
    prompt_tokens: int | None


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


def run_base_station(target: TargetOptions, socket: SocketOptions, operation: OperationOptions) -> None:
    """Serve until SIGINT or SIGTERM; the second lets open sessions finish."""
    share_one_heap()
    _raise_descriptor_limit()
    # Without it, each counter has a second series with the time it began.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    peer_bytes = parse_size("peer-memory", target.peer_memory)
    metrics = Metrics()
    with ExitStack() as stack:
        metrics_bind, record, profile = operation.metrics_bind, operation.record, operation.profile
        monitor = stack.enter_context(closing(Monitor(metrics_bind, metrics, socket.keys))) if metrics_bind else None
        records = stack.enter_context(closing(PassRecordFile(record))) if record else None
        profiler = stack.enter_context(PassProfiler(profile)) if profile else None
        logger.info("loading %s", target.model)
        model = TargetModel.load(target.model, target.dtype, target.torch_device, target.kv_memory, target.use_cache)
        told = ", ".join(f"{name} {value}" for name, value in model.placement.items())
        logger.info("target: %s; free memory: %s", told, readable_size(free_memory(model.torch_device)))
        metrics.describe_target(model.placement, partial(free_memory, model.torch_device))
        budget = PassBudget.of(target.pass_tokens, target.prompt_tokens, model.torch_device.type == "cuda")
        kv_bytes = model.kv_bytes if model.torch_device.type == "cpu" else 0
        guard = MemoryGuard.of_process(kv_bytes, peer_bytes)
        server = Server(
            model, socket.bind, socket.limits, socket.keys, socket.insecure, budget, metrics, records, profiler, guard
        )
        _stop_on_signals(server, operation.drain_seconds)
        if monitor:
            monitor.alive, monitor.ready = (lambda: server.alive), (lambda: not server.draining)
            logger.info("fleet page at %s/, metrics at %s/metrics", monitor.url, monitor.url)
        logger.info("KV pool: %d positions", model.kv_pool.capacity)
        logger.info("serving %s at %s", target.model, server.address)
        server.serve()
    logger.info("stopped")


def _raise_descriptor_limit() -> None:
    """Allow as many connections as the system lets this process have: each needs a descriptor."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _stop_on_signals(server: Server, drain_seconds: float) -> None:
    """SIGINT stops at once; SIGTERM drains, and stops at once when it comes again."""
    signal.signal(signal.SIGINT, lambda *_: server.stop())
    signal.signal(signal.SIGTERM, lambda *_: server.stop(0.0 if server.draining else drain_seconds))
