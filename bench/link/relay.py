"""A TCP relay that emulates a slow link on loopback: rate, delay, jitter and outages of each direction.

It reads whatever arrives at once and forwards it when a link with these properties
would have delivered it: one thread per direction reads and schedules the pieces,
another waits and sends. It handles bytes, not messages.
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
from typing import Annotated, TypeAlias

import typer

from bench.setup.options import MIN_MBIT
from device.link.probe import endpoint
from protocol.errors import SettingsError

PIECE = 1448
"""Bytes forwarded at a time: the payload of a TCP segment."""
_QUEUED_PIECES = 8192
Due: TypeAlias = tuple[float, bytes]

_RateOption = Annotated[float, typer.Option(help="Rate in Mbit/s.", min=MIN_MBIT)]
_DelayOption = Annotated[float, typer.Option(help="One-way delay in milliseconds.", min=0)]
_JitterOption = Annotated[float, typer.Option(help="Additional random delay, at most this many milliseconds.", min=0)]
_OUTAGE = "START:SECONDS, relative to the start of the relay; repeatable."


def relay(
    server: Annotated[str, typer.Option(help="The base station, as tcp://HOST:PORT.")],
    up_mbit: _RateOption = inf,
    up_delay_ms: _DelayOption = 0.0,
    up_jitter_ms: _JitterOption = 0.0,
    up_outages: Annotated[list[str] | None, typer.Option("--up-outage", help=_OUTAGE)] = None,
    down_mbit: _RateOption = inf,
    down_delay_ms: _DelayOption = 0.0,
    down_jitter_ms: _JitterOption = 0.0,
    down_outages: Annotated[list[str] | None, typer.Option("--down-outage", help=_OUTAGE)] = None,
) -> None:
    """Emulate a slow link to a base station, until Ctrl-C.

    Devices connect to the address that the command prints.
    """
    up = LinkDirection(1e6 * up_mbit, up_delay_ms / 1e3, up_jitter_ms / 1e3, parse_outages(up_outages or []))
    down = LinkDirection(1e6 * down_mbit, down_delay_ms / 1e3, down_jitter_ms / 1e3, parse_outages(down_outages or []))
    slow_link = Relay(*endpoint(server), up, down)
    typer.echo(f"relaying {server} at {slow_link.address}", err=True)
    slow_link.serve()


@dataclass(frozen=True)
class Outage:
    """Nothing is sent for ``seconds`` from ``start``, in seconds since the relay started."""

    start: float
    seconds: float


@dataclass(frozen=True)
class LinkDirection:
    """One direction of a link.

    Attributes:
        bits_per_second: its rate.
        delay_seconds: from the end of sending to arrival.
        jitter_seconds: largest additional delay, uniformly distributed; the order is kept, as TCP keeps it.
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
                raise SettingsError(name, value, "0 or more seconds")


class Schedule:
    """Arrival times in one direction.

    Args:
        direction: its properties.
        seed: of the jitter.
    """

    def __init__(self, direction: LinkDirection, seed: int = 0) -> None:
        self._direction = direction
        self._outages = sorted(direction.outages, key=lambda one: one.start)
        self._rng = random.Random(seed)  # noqa: S311 - a simulation
        self._free = self._last = 0.0

    def due(self, now: float, size: int) -> float:
        """The arrival time of ``size`` bytes handed over ``now``, in seconds since the relay started."""
        self._free = self._end_of_sending(max(now, self._free), 8 * size / self._direction.bits_per_second)
        arrival = self._free + self._direction.delay_seconds + self._rng.uniform(0, self._direction.jitter_seconds)
        self._last = max(self._last, arrival)
        return self._last

    def _end_of_sending(self, start: float, airtime: float) -> float:
        """When sending ends; outages interrupt it."""
        for outage in self._outages:
            end = outage.start + outage.seconds
            if outage.start <= start < end:
                start = end
            elif start < outage.start < start + airtime:
                airtime -= outage.start - start
                start = end
        return start + airtime


class Relay:
    """Listens on a free port of loopback, and forwards to a base station and back at the speed of the link.

    Args:
        host: of the base station.
        port: of the base station.
        up: from devices to the base station.
        down: from the base station to devices.

    Attributes:
        address: where devices connect.
    """

    def __init__(self, host: str, port: int, up: LinkDirection, down: LinkDirection) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "tcp://{}:{}".format(*self._listener.getsockname())
        self._target = (host, port)
        self._directions = (up, down)
        self._began = time.monotonic()

    def serve(self) -> None:
        """Forward until ``close``; a connection is closed if the base station does not accept it."""
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                device, _ = self._listener.accept()
                try:
                    station = socket.create_connection(self._target)
                except OSError:
                    device.close()
                    continue
                self._forward(device, station)

    def close(self) -> None:
        """Stop accepting connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _forward(self, device: socket.socket, station: socket.socket) -> None:
        for end in (device, station):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for direction, source, sink in zip(self._directions, (device, station), (station, device), strict=True):
            queued: queue.Queue[Due] = queue.Queue(_QUEUED_PIECES)
            threading.Thread(target=self._read, args=(source, Schedule(direction), queued), daemon=True).start()
            threading.Thread(target=self._write, args=(sink, queued), daemon=True).start()

    def _read(self, source: socket.socket, schedule: Schedule, queued: "queue.Queue[Due]") -> None:
        """Schedule what arrives; the end of the connection is scheduled as an empty piece."""
        piece = b"-"
        while piece:
            try:
                piece = source.recv(PIECE)
            except OSError:
                piece = b""
            queued.put((schedule.due(time.monotonic() - self._began, len(piece)), piece))

    def _write(self, sink: socket.socket, queued: "queue.Queue[Due]") -> None:
        while True:
            due, piece = queued.get()
            time.sleep(max(0.0, self._began + due - time.monotonic()))
            with contextlib.suppress(OSError):  # this end is closed, and its own reader closes the other one
                if not piece:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(piece)


def relay_command(server: str, up: LinkDirection, down: LinkDirection) -> list[str]:
    """Arguments of ``python -m`` that start a relay in front of ``server``."""
    command = ["bench", "relay", "--server", server]
    for name, direction in (("up", up), ("down", down)):
        if direction.bits_per_second < inf:
            command += [f"--{name}-mbit", f"{direction.bits_per_second / 1e6:g}"]
        command += [f"--{name}-delay-ms", f"{1e3 * direction.delay_seconds:g}"]
        command += [f"--{name}-jitter-ms", f"{1e3 * direction.jitter_seconds:g}"]
        command += [f"--{name}-outage={one.start:g}:{one.seconds:g}" for one in direction.outages]
    return command


def parse_outages(texts: Sequence[str]) -> tuple[Outage, ...]:
    """Outages from texts START:SECONDS.

    Raises:
        SettingsError: a text has another form.
    """
    outages: list[Outage] = []
    for text in texts:
        start, _, seconds = text.partition(":")
        try:
            outages.append(Outage(float(start), float(seconds)))
        except ValueError as error:
            raise SettingsError("outage", text, "START:SECONDS, as 2.5:1") from error
    return tuple(outages)
