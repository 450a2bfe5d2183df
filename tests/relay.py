"""A TCP relay between devices and a base station that counts bytes and can drop connections."""

import contextlib
import socket
import threading
import time

_HEARTBEATS = {b"\x04\x07\x04PING": 9, b"\x04\x05\x04PONG": 7}
"""ZeroMQ's heartbeats on a connection without keys: how they begin, and their bytes."""


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


class CountingRelay:
    """Forwards connections to ``port`` on loopback to a base station; does not count heartbeats.

    Attributes:
        port: the port the relay listens on.
        station_port: the base station's port on loopback, for new connections.
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
        self._listener.shutdown(socket.SHUT_RDWR)  # close() alone would accept one more connection
        self._accepting.join()
        self._listener.close()
        self.drop_connections()

    def drop_connections(self) -> None:
        """Close all connections; the relay still accepts new ones."""
        while self._sockets:
            connection = self._sockets.pop()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def drop_ends_at_devices(self) -> None:
        """Close the devices' ends of all connections; the base station notices nothing."""
        for connection in self._sockets[::2]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def wait_until_idle(self) -> tuple[int, int]:
        """Wait until no bytes are in transit; return the bytes up and down so far."""
        before = None
        while before != (now := (self._counts[0], self._counts[1])):
            before = now
            time.sleep(0.3)
        return now

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # __exit__ shuts the listener down
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
        with contextlib.suppress(OSError):  # no base station is listening
            return socket.create_connection(("127.0.0.1", self.station_port))
        return None

    def _pump(self, source: socket.socket, sink: socket.socket, direction: int) -> None:
        with contextlib.suppress(OSError):  # one end closed the connection
            while data := source.recv(65536):
                heartbeats = sum(size * data.count(start) for start, size in _HEARTBEATS.items())
                self._counts[direction] += len(data) - heartbeats
                sink.sendall(data)
