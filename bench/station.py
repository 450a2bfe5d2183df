"""A base station in a process of its own, as an operator would start it, on loopback."""

import contextlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from protocol.errors import LinkError

_SERVING = re.compile(r"serving .* at (tcp://\S+)")
_STOP_SECONDS = 10


@dataclass(frozen=True)
class StationProcess:
    """A base station that serves: where devices connect, where its metrics are, and its process."""

    address: str
    metrics_url: str
    pid: int


@contextmanager
def running_station(target: str, dtype: str) -> Iterator[str]:
    """Start a base station on a free port; gives its address once it serves.

    Raises:
        LinkError: it ended before it served; its last line says why.
    """
    with station_process(target, dtype) as station:
        yield station.address


@contextmanager
def station_process(target: str, dtype: str, options: Sequence[str] = ()) -> Iterator[StationProcess]:
    """``running_station``, with more options of the command line, and all that is known of it.

    Raises:
        LinkError: see above.
    """
    metrics_bind = f"127.0.0.1:{_free_port()}"
    command = [sys.executable, "-m", "basestation", "serve", "--target", target, "--dtype", dtype]
    process = subprocess.Popen(  # noqa: S603 - our own program
        [*command, "--bind", "tcp://127.0.0.1:0", "--metrics-bind", metrics_bind, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        address = _address(process.stderr)
        threading.Thread(target=_discard, args=(process.stderr,), daemon=True).start()
        yield StationProcess(address, f"http://{metrics_bind}", process.pid)
    finally:
        process.terminate()
        try:
            process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _discard(lines: IO[str]) -> None:
    """Read on, so that a station that writes a long log is never stopped by a full pipe."""
    with contextlib.suppress(ValueError), lines:
        for _ in lines:
            pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _address(lines: Iterator[str]) -> str:
    last = ""
    for line in lines:
        if found := _SERVING.search(line):
            return found.group(1)
        last = line.strip() or last
    raise LinkError(f"the base station did not start: {last}")
