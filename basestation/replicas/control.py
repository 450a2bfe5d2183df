"""How ``scale`` and ``restart`` reach the base station that serves on this machine: a socket file of its user.

A request is a line of JSON; the answer is a line too.
"""

import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

import platformdirs

from protocol.errors import LinkError

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0
_RETRY_SECONDS = 1.0
"""After a request that failed: where descriptors are short, the next one would fail at once."""
_MAX_BYTES = 256
_DONE, _REFUSED = b"done\n", b"not understood\n"
_ALL_ADDRESSES = "0.0.0.0"  # noqa: S104 - not bound here
_ADDRESSES = {"*": _ALL_ADDRESSES, "localhost": "127.0.0.1"}


@dataclass(frozen=True)
class Scale:
    """Have this many replicas."""

    replicas: int


@dataclass(frozen=True)
class Restart:
    """Replace all replicas, one after another."""


Request: TypeAlias = Scale | Restart


def control_file(bind: str) -> Path:
    """The socket file of the base station with that endpoint."""
    host, colon, port = bind.removeprefix("tcp://").rpartition(":")
    name = quote(f"{_ADDRESSES.get(host, host)}{colon}{port}", safe="[]:")
    return platformdirs.user_state_path("edgedraft") / "stations" / f"{name}.sock"


class Control:
    """Takes requests, and keeps them until they are asked for.

    Args:
        path: of the socket file; one that a killed process left is replaced.

    Raises:
        LinkError: the file cannot be made, or another base station listens there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._closed = False
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_left_over(path)
            self._listener.bind(str(path))
            self._listener.listen()
        except OSError as error:
            self._listener.close()
            raise LinkError(f"{str(path)!r} cannot be made: {error}") from error
        threading.Thread(target=self._listen, name="control", daemon=True).start()

    def requests(self) -> Iterator[Request]:
        """What has arrived since the last call, in order."""
        with suppress(queue.Empty):
            while True:
                yield self._requests.get_nowait()

    def close(self) -> None:
        """Remove the file."""
        self._closed = True
        self._path.unlink(missing_ok=True)  # while it listens, so that the file is no other base station's
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends ``accept``
        self._listener.close()

    def _listen(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
                with connection:
                    self._answer(connection)
            except OSError as error:
                if not self._closed:
                    logger.warning("a request to scale or restart failed: %s", error)
                    time.sleep(_RETRY_SECONDS)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_ANSWER_SECONDS)
        with connection.makefile("rb") as lines:
            line = lines.readline(_MAX_BYTES)
        if not line:  # a base station that looks whether another one listens
            return
        try:
            request = _decode(line)
        except ValueError:
            logger.warning("a request to scale or restart is not understood: %r", line)
            connection.sendall(_REFUSED)
        else:
            self._requests.put(request)
            connection.sendall(_DONE)


def send_request(bind: str, request: Request) -> None:
    """Send a request to the base station that serves at ``bind``, or at that port of all addresses.

    Raises:
        LinkError: none answers, or it does not understand the request.
    """
    path, port = control_file(bind), bind.rpartition(":")[2]
    candidates = [path, *(control_file(f"tcp://{host}:{port}") for host in (_ALL_ADDRESSES, "[::]"))]
    try:
        with _connect(candidates) as connection:
            connection.sendall(_encode(request))
            answer = connection.recv(_MAX_BYTES)
    except OSError as error:
        raise LinkError(
            f"no base station with --replicas answers at {str(path)!r}: {error}; give the --bind that it serves"
        ) from error
    if answer != _DONE:
        raise LinkError(f"the base station at {str(path)!r} is of another version; run the command of that version")


def _connect(paths: Sequence[Path]) -> socket.socket:
    """Connect to the first socket file where somebody listens.

    Raises:
        OSError: nobody does, or it is too busy.
    """
    failure: OSError | None = None
    for path in paths:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_ANSWER_SECONDS)
        try:
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            if not isinstance(error, FileNotFoundError | ConnectionRefusedError):
                raise
            failure = failure or error
        else:
            return connection
    assert failure
    raise failure


def _remove_left_over(path: Path) -> None:
    """Remove the socket file of a process that was killed.

    Raises:
        OSError: a base station listens there, or the file cannot be removed.
    """
    with suppress(FileNotFoundError, ConnectionRefusedError):
        _connect([path]).close()
        raise FileExistsError("another base station listens there")
    path.unlink(missing_ok=True)


def _encode(request: Request) -> bytes:
    values = {"scale": request.replicas} if isinstance(request, Scale) else {"restart": True}
    return json.dumps(values).encode() + b"\n"


def _decode(line: bytes) -> Request:
    """The request that ``_encode`` wrote.

    Raises:
        ValueError: it is none.
    """
    match json.loads(line):
        case {"scale": int(replicas)} if replicas > 0:
            return Scale(replicas)
        case {"restart": True}:
            return Restart()
    raise ValueError("no request")
