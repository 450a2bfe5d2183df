"""A base station on a real socket, in a thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from basestation.server import Server

ANY_PORT = "tcp://127.0.0.1:0"


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
