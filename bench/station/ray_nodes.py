"""A Ray cluster on this machine: its nodes have cores of their own, as the machines of a cluster do."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from socket import create_connection

from bench.setup.server_process import end_process
from bench.setup.station_process import free_port
from protocol.errors import LinkError

_HOST = "127.0.0.1"
_START_SECONDS = 60.0
_STORE_BYTES = 100 * 2**20
"""Nothing is stored there; about the least that Ray accepts."""


@contextmanager
def ray_nodes(count: int) -> Iterator[str]:
    """Start a head and further nodes, ``count`` in all, each with one core by Ray's count; yields the head's address.

    Raises:
        LinkError: the head does not answer within a minute.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray writes one to the home folder otherwise
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    port = free_port()
    with ExitStack() as stack:
        stack.enter_context(_node("--head", "--port", str(port), "--include-dashboard", "false"))
        _wait_for(port)
        for _ in range(count - 1):
            stack.enter_context(_node("--address", f"{_HOST}:{port}"))
        yield f"{_HOST}:{port}"


@contextmanager
def _node(*options: str) -> Iterator[None]:
    ports = ["--min-worker-port", "0", "--max-worker-port", "0"]  # any free ones: nodes of one machine share them
    sizes = ["--num-cpus", "1", "--object-store-memory", str(_STORE_BYTES)]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    with subprocess.Popen(  # noqa: S603 - Ray's own command
        [*command, *options, *ports, *sizes], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            end_process(process)


def _wait_for(port: int) -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            create_connection((_HOST, port), 1).close()
        except OSError as error:
            if time.monotonic() > end:
                raise LinkError(f"no head of Ray at {_HOST}:{port} after {_START_SECONDS:.0f} s: {error}") from None
            time.sleep(0.2)
        else:
            return
