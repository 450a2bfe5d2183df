"""A TCP relay between devices and a base station that counts what passes, and can hang up."""

import contextlib
import socket
import threading
import time


class CountingRelay:
    """Listens at ``port`` of loopback and passes everything on to a base station.

    Attributes:
        station_port: of loopback, where new connections lead.
    """

    def __init__(self, station_port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.station_port = station_port
        self._counts = [0, 0]
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> "CountingRelay":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        """Break all connections; new ones are taken."""
        while self._sockets:
            one = self._sockets.pop()
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def settled(self) -> tuple[int, int]:
        """Bytes up and down, once nothing has passed for a while."""
        before = None
        while before != (now := (self._counts[0], self._counts[1])):
            before = now
            time.sleep(0.3)
        return now

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed, as at the end of every test
            while True:
                device, _ = self._listener.accept()
                station = socket.create_connection(("127.0.0.1", self.station_port))
                self._sockets += [device, station]
                for source, sink, direction in ((device, station, 0), (station, device, 1)):
                    threading.Thread(target=self._pump, args=(source, sink, direction), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: int) -> None:
        with contextlib.suppress(OSError):  # one end is gone
            while data := source.recv(65536):
                self._counts[direction] += len(data)
                sink.sendall(data)
