"""A base station in a process of its own, as an operator would start it, on loopback."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench.setup.server_process import serving


def station_command(target: str, dtype: str) -> list[str]:
    """What starts a base station on a free port."""
    return ["basestation", "serve", "--target", target, "--dtype", dtype, "--bind", "tcp://127.0.0.1:0"]


@dataclass(frozen=True)
class StationProcess:
    """A base station that serves: where devices connect, where its metrics are, and its process."""

    address: str
    metrics_url: str
    pid: int


@contextmanager
def running_station(target: str, dtype: str, *options: str) -> Iterator[str]:
    """Start a base station on a free port, with further options; gives its address once it serves.

    Raises:
        LinkError: it ended before it served; its last line says why.
    """
    with serving([*station_command(target, dtype), *options]) as served:
        yield served.address


@contextmanager
def station_process(target: str, dtype: str, options: Sequence[str] = ()) -> Iterator[StationProcess]:
    """``running_station``, with more options of the command line, and all that is known of it.

    Raises:
        LinkError: see above.
    """
    metrics_bind = f"127.0.0.1:{_free_port()}"
    with serving([*station_command(target, dtype), "--metrics-bind", metrics_bind, *options]) as served:
        yield StationProcess(served.address, f"http://{metrics_bind}", served.process.pid)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
