"""A base station in a process of its own, as an operator would start it, on loopback."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from protocol.errors import LinkError

_SERVING = re.compile(r"serving .* at (tcp://\S+)")
_STOP_SECONDS = 10


@contextmanager
def running_station(target: str, dtype: str, *options: str) -> Iterator[str]:
    """Start a base station on a free port, with further options; gives its address once it serves.

    Raises:
        LinkError: it ended before it served; its last line says why.
    """
    command = [sys.executable, "-m", "basestation", "serve", "--target", target, "--dtype", dtype]
    process = subprocess.Popen(  # noqa: S603 - our own program
        [*command, "--bind", "tcp://127.0.0.1:0", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        yield _address(process.stderr)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _address(lines: Iterator[str]) -> str:
    last = ""
    for line in lines:
        if found := _SERVING.search(line):
            return found.group(1)
        last = line.strip() or last
    raise LinkError(f"the base station did not start: {last}")
