"""Start a server command of edgedraft in a process of its own, and wait until it prints its address."""

import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from bench.setup.environment import flags_alone
from protocol.errors import LinkError

_SERVING = re.compile(r"(?:serving|relaying) .* at (tcp://\S+)")
_STOP_SECONDS = 10


@dataclass(frozen=True)
class Served:
    """A running command and the address it serves."""

    address: str
    process: subprocess.Popen[str]

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None


@contextmanager
def serving(arguments: Sequence[str], core: int | None = None) -> Iterator[Served]:
    """Start ``python -m`` with the arguments, pinned to ``core`` if given, and yield once it serves.

    Raises:
        LinkError: it exited before it served; the message holds its last line.
    """
    process = subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-m", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=flags_alone(),
    )
    if core is not None:
        os.sched_setaffinity(process.pid, {core})  # before it starts threads, which inherit it
    assert process.stderr is not None
    reader = threading.Thread(target=deque, args=(process.stderr, 0), daemon=True)
    try:
        address = _address(process.stderr, arguments[0])
        reader.start()  # a full pipe would block the process
        yield Served(address, process)
    finally:
        end_process(process)
        if reader.is_alive():
            reader.join()
        process.stderr.close()


def end_process(process: subprocess.Popen[Any]) -> None:
    """Let a process end, and kill it if it does not within ten seconds."""
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _address(lines: IO[str], name: str) -> str:
    last = ""
    for line in lines:
        if found := _SERVING.search(line):
            return found.group(1)
        last = line.strip() or last
    raise LinkError(f"`python -m {name}` ended before it served: {last.removeprefix('error: ')}")
