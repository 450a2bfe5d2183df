"""A base station on a real socket, in a thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from basestation.server import Server


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
