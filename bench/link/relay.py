"""A TCP relay that makes loopback a slow link: rate, delay, jitter and outages, for each direction.

It takes what arrives at once and hands it on when a link of these properties
would have: one thread reads a direction and says when each piece is due, another
waits for that. It knows bytes, not messages.
"""

import contextlib
import queue
import random
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import TypeAlias

from protocol.errors import LinkError, SettingsError

PIECE = 1448
"""Bytes of a TCP segment: what is handed on at once."""
_WAITING_PIECES = 8192
Due: TypeAlias = tuple[float, bytes]


@dataclass(frozen=True)
class Outage:
    """Nothing is sent from ``start`` for ``seconds``; in seconds since the relay began."""

    start: float
    seconds: float


@dataclass(frozen=True)
class Way:
    """One direction of a link.

    Attributes:
        bits_per_second: it sends at most.
        delay_seconds: from the end of sending to arrival.
        jitter_seconds: up to so much more, evenly spread; order is kept, as TCP keeps it.
        outages: when nothing is sent.

    Raises:
        SettingsError: a value is not allowed.
    """

    bits_per_second: float = inf
    delay_seconds: float = 0.0
    jitter_seconds: float = 0.0
    outages: tuple[Outage, ...] = ()

    def __post_init__(self) -> None:
        if not self.bits_per_second > 0:
            raise SettingsError("bits_per_second", self.bits_per_second, "above 0")
        times = {entry.name: getattr(self, entry.name) for entry in fields(self)[1:3]}
        times |= {"outage": min((min(one.start, one.seconds) for one in self.outages), default=0.0)}
        for name, value in times.items():
            if not 0 <= value < inf:
                raise SettingsError(name, value, "0 and more seconds")


class Schedule:
    """When what is sent one way arrives.

    Args:
        way: the direction's properties.
        seed: of its jitter.
    """

    def __init__(self, way: Way, seed: int = 0) -> None:
        self._way = way
        self._outages = sorted(way.outages, key=lambda one: one.start)
        self._chance = random.Random(seed)  # noqa: S311 - a simulation
        self._free = self._last = 0.0

    def due(self, now: float, size: int) -> float:
        """When ``size`` bytes arrive that are handed over ``now``; in seconds since the relay began."""
        self._free = self._sent(max(now, self._free), 8 * size / self._way.bits_per_second)
        arrival = self._free + self._way.delay_seconds + self._chance.uniform(0, self._way.jitter_seconds)
        self._last = max(self._last, arrival)
        return self._last

    def _sent(self, begin: float, airtime: float) -> float:
        """When sending ends; an outage interrupts it."""
        for outage in self._outages:
            end = outage.start + outage.seconds
            if outage.start <= begin < end:
                begin = end
            elif begin < outage.start < begin + airtime:
                airtime -= outage.start - begin
                begin = end
        return begin + airtime


class Relay:
    """Listens at a free port of loopback, and passes on to a base station and back as the two ways allow.

    Args:
        host: where the base station is.
        port: of it.
        up: from devices to the base station.
        down: from it to devices.

    Attributes:
        address: where devices connect to.
    """

    def __init__(self, host: str, port: int, up: Way, down: Way) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "tcp://{}:{}".format(*self._listener.getsockname())
        self._target = (host, port)
        self._ways = (up, down)
        self._began = time.monotonic()

    def serve(self) -> None:
        """Pass on until ``close``; a connection that the base station does not take is closed."""
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                device, _ = self._listener.accept()
                try:
                    station = socket.create_connection(self._target)
                except OSError:
                    device.close()
                    continue
                self._join(device, station)

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _join(self, device: socket.socket, station: socket.socket) -> None:
        for end in (device, station):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for way, source, sink in zip(self._ways, (device, station), (station, device), strict=True):
            waiting: queue.Queue[Due] = queue.Queue(_WAITING_PIECES)
            threading.Thread(target=self._read, args=(source, Schedule(way), waiting), daemon=True).start()
            threading.Thread(target=self._write, args=(sink, waiting), daemon=True).start()

    def _read(self, source: socket.socket, schedule: Schedule, waiting: "queue.Queue[Due]") -> None:
        """Take what arrives; an end of the connection travels like a byte."""
        piece = b"-"
        while piece:
            try:
                piece = source.recv(PIECE)
            except OSError:
                piece = b""
            waiting.put((schedule.due(time.monotonic() - self._began, len(piece)), piece))

    def _write(self, sink: socket.socket, waiting: "queue.Queue[Due]") -> None:
        while True:
            due, piece = waiting.get()
            time.sleep(max(0.0, self._began + due - time.monotonic()))
            with contextlib.suppress(OSError):  # that end is gone: the other one is told by its own reader
                if not piece:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(piece)


def relay_command(server: str, up: Way, down: Way) -> list[str]:
    """What starts a relay in front of ``server`` (``bench/serving.py``)."""
    command = ["bench", "relay", "--server", server]
    for name, way in (("up", up), ("down", down)):
        if way.bits_per_second < inf:
            command += [f"--{name}-mbit", f"{way.bits_per_second / 1e6:g}"]
        command += [f"--{name}-delay-ms", f"{1e3 * way.delay_seconds:g}"]
        command += [f"--{name}-jitter-ms", f"{1e3 * way.jitter_seconds:g}"]
        command += [f"--{name}-outage={one.start:g}:{one.seconds:g}" for one in way.outages]
    return command


def endpoint(address: str) -> tuple[str, int]:
    """Host and port of ``tcp://HOST:PORT``.

    Raises:
        LinkError: it is none such.
    """
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdecimal():
        raise LinkError(f"{address!r} is no address; allowed: tcp://HOST:PORT")
    return host, int(port)


def parse_outages(texts: Sequence[str]) -> tuple[Outage, ...]:
    """Outages from ``START:SECONDS`` each.

    Raises:
        SettingsError: one is none such.
    """
    outages: list[Outage] = []
    for text in texts:
        start, _, seconds = text.partition(":")
        try:
            outages.append(Outage(float(start), float(seconds)))
        except ValueError as error:
            raise SettingsError("outage", text, "START:SECONDS, as 2.5:1") from error
    return tuple(outages)
