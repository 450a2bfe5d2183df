"""Start a base station in a process of its own, on a free port of loopback."""

import re
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench.setup.server_process import serving


def station_command(target: str, dtype: str, *options: str) -> list[str]:
    """Arguments of ``python -m`` that start a base station on a free port, with further options."""
    return ["basestation", "serve", "--target", target, "--dtype", dtype, "--bind", "tcp://127.0.0.1:0", *options]


@dataclass(frozen=True)
class StationProcess:
    """A running base station: the address for devices, the URL of its metrics, and its process id."""

    address: str
    metrics_url: str
    pid: int


@contextmanager
def running_station(target: str, dtype: str, *options: str) -> Iterator[str]:
    """Start a base station with further command-line options, and yield its address once it serves.

    Raises:
        LinkError: it exited before it served; the message holds its last line.
    """
    with serving(station_command(target, dtype, *options)) as served:
        yield served.address


@contextmanager
def station_process(target: str, dtype: str, options: Sequence[str] = ()) -> Iterator[StationProcess]:
    """Like ``running_station``, with metrics; yields the address, the metrics URL and the process id.

    Raises:
        LinkError: it exited before it served; the message holds its last line.
    """
    metrics_bind = f"127.0.0.1:{free_port()}"
    with serving(station_command(target, dtype, "--metrics-bind", metrics_bind, *options)) as served:
        yield StationProcess(served.address, f"http://{metrics_bind}", served.process.pid)


def replica_names(metrics_url: str) -> set[str]:
    """The replicas whose metrics a front has; none where nothing answers."""
    try:
        with urllib.request.urlopen(f"{metrics_url}/metrics", timeout=5) as answer:  # noqa: S310 - our own
            text = answer.read().decode()
    except OSError:
        return set()
    return set(re.findall(r'replica="(replica-\d+)"', text))


def free_port() -> int:
    """A port of loopback that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
