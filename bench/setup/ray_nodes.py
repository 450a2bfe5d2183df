"""A Ray cluster of several logical nodes on this machine."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from bench.setup.environment import flags_alone
from protocol.errors import LinkError

_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
_OPTIONS = {
    "node-ip-address": "127.0.0.1",
    "num-cpus": "1",
    "object-store-memory": "100000000",
    "min-worker-port": "0",
    "max-worker-port": "0",
    "dashboard-agent-listen-port": "0",
    "include-dashboard": "false",
}


@contextmanager
def ray_nodes(count: int) -> Iterator[str]:
    """Start nodes of one core each, with a token that processes started meanwhile have too; yields the address.

    Raises:
        LinkError: the first does not start within a minute.
    """
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    before = {name: os.environ.get(name) for name in token}
    os.environ.update(token)
    with ExitStack() as stack:
        stack.callback(_restore, before)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        address = f"127.0.0.1:{port}"
        stack.enter_context(_node("--head", f"--port={port}"))
        _wait_for(address)
        for _ in range(count - 1):
            stack.enter_context(_node(f"--address={address}"))
        yield address


@contextmanager
def _node(*arguments: str) -> Iterator[None]:
    options = [f"--{name}={value}" for name, value in _OPTIONS.items()]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments, *options]
    silent = subprocess.DEVNULL
    with subprocess.Popen(command, env=flags_alone(), stdout=silent, stderr=silent) as process:  # noqa: S603 - our own
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for(address: str) -> None:
    host, _, port = address.rpartition(":")
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        try:
            socket.create_connection((host, int(port)), 1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise LinkError(f"Ray did not start at {address} within {_START_SECONDS:.0f} s")


def _restore(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
