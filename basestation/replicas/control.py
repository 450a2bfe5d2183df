"""How ``scale`` and ``restart`` reach the base station that serves on this machine: a socket file of its user."""

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TypeAlias

import platformdirs

from protocol.errors import LinkError

_ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class Scale:
    """Have this many replicas."""

    replicas: int


@dataclass(frozen=True)
class Restart:
    """Replace all replicas, one after another."""


Request: TypeAlias = Scale | Restart


def control_file(bind: str) -> Path:
    """The socket file of the base station with that ``--bind``."""
    return platformdirs.user_state_path("edgedraft") / "stations" / f"{bind.rpartition(':')[2]}.sock"


class Control:
    """Takes requests, and keeps them until they are asked for.

    Args:
        path: of the socket file; one that a killed process left is replaced.

    Raises:
        LinkError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._listener = Listener(str(path), "AF_UNIX")
        except OSError as error:
            raise LinkError(f"{str(path)!r} cannot be made: {error}") from error
        threading.Thread(target=self._listen, name="control", daemon=True).start()

    def requests(self) -> Iterator[Request]:
        """What has arrived since the last call, in order."""
        with suppress(queue.Empty):
            while True:
                yield self._requests.get_nowait()

    def close(self) -> None:
        """Remove the file."""
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _listen(self) -> None:
        with suppress(OSError):  # it was closed
            while True:
                self._answer(self._listener.accept())

    def _answer(self, connection: Connection) -> None:
        with connection, suppress(EOFError, OSError):
            if connection.poll(_ANSWER_SECONDS):
                self._requests.put(connection.recv())
                connection.send(True)


def send_request(path: Path, request: Request) -> None:
    """Send a request to the base station with that socket file.

    Raises:
        LinkError: none answers.
    """
    try:
        with Client(str(path), "AF_UNIX") as connection:
            connection.send(request)
            if connection.poll(_ANSWER_SECONDS) and connection.recv():
                return
    except (OSError, EOFError) as error:
        raise LinkError(
            f"no base station with --replicas answers at {str(path)!r}: {error}; give the --bind that it serves"
        ) from error
    raise LinkError(f"the base station at {str(path)!r} did not answer within {_ANSWER_SECONDS:.0f} s")
