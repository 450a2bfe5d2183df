"""A TCP relay between devices and a base station that counts what passes, and can hang up."""

import contextlib
import socket
import threading
import time


class CountingRelay:
    """Listens at ``port`` of loopback and passes everything on to a base station.

    Attributes:
        station_port: of loopback, where new connections margin.
    """

    def __init__(self, station_port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.station_port = station_port
        self._counts = [0, 0]
        self._sockets: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> "CountingRelay":
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # closing alone would let one more connection in
        self._accepting.join()
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
        with contextlib.suppress(OSError):  # the listener is shut down, as at the end of every test
            while True:
                device, _ = self._listener.accept()
                self._sockets.append(device)
                station = self._connect()
                if station is None:
                    device.close()
                    continue
                self._sockets.append(station)
                for source, sink, direction in ((device, station, 0), (station, device, 1)):
                    threading.Thread(target=self._pump, args=(source, sink, direction), daemon=True).start()

    def _connect(self) -> socket.socket | None:
        with contextlib.suppress(OSError):  # the base station is gone
            return socket.create_connection(("127.0.0.1", self.station_port))
        return None

    def _pump(self, source: socket.socket, sink: socket.socket, direction: int) -> None:
        with contextlib.suppress(OSError):  # one end is gone
            while data := source.recv(65536):
                self._counts[direction] += len(data)
                sink.sendall(data)
