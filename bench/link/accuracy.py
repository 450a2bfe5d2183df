"""The accuracy of the relay's rate and delay on this machine."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

from bench.link.relay import PIECE, LinkDirection, relay_command
from bench.setup.options import JsonOption, console, progress_bar
from bench.setup.results import Results, Row
from bench.setup.server_process import serving
from device.link.probe import endpoint

RATES = (1e6, 5e6, 50e6)
DELAYS = (0.0, 0.005, 0.010, 0.025, 0.050)
PROBES = 40
_PROBE_BYTES = 32
_RATE_SECONDS = 1.5
_TIMESTAMP = struct.Struct("<d")


def link(json_file: JsonOption = None) -> None:
    """Measure how accurately the relay keeps rate and delay on this machine."""
    with progress_bar() as progress:
        task = progress.add_task("cases", total=2 * len(cases()))
        rows = measure_accuracy(lambda: progress.advance(task))
    measured = Results({}, rows)
    measured.show(console)
    measured.write(json_file)


def cases() -> list[LinkDirection]:
    """Every rate with every delay, then one case with jitter."""
    return [*(LinkDirection(rate, delay) for rate in RATES for delay in DELAYS), LinkDirection(5e6, 0.020, 0.010)]


def measure_accuracy(advance: Callable[[], object]) -> list[Row]:
    """A row per case and direction."""
    rows = []
    for asked in cases():
        for direction in ("up", "down"):
            with _connected(asked, direction) as (source, sink):
                rows.append(_row(asked, direction, source, sink))
            advance()
    return rows


def _row(asked: LinkDirection, direction: str, source: socket.socket, sink: socket.socket) -> Row:
    airtime = 8 * _PROBE_BYTES / asked.bits_per_second
    delays = [delay - airtime for delay in _delays(source, sink)]
    rate = _rate(source, sink, asked.bits_per_second)
    latest = asked.delay_seconds + asked.jitter_seconds
    return {
        "case": f"{asked.bits_per_second / 1e6:g} Mbit/s {direction}, {1e3 * asked.delay_seconds:g} ms"
        + (f", jitter {1e3 * asked.jitter_seconds:g} ms" if asked.jitter_seconds else ""),
        "rate_mbit": rate / 1e6,
        "rate_error": rate / asked.bits_per_second - 1,
        "delay_milliseconds": 1e3 * median(delays),
        "min_error_milliseconds": 1e3 * (min(delays) - asked.delay_seconds),
        "median_error_milliseconds": 1e3 * (median(delays) - (asked.delay_seconds + latest) / 2),
        "max_error_milliseconds": 1e3 * (max(delays) - latest),
    }


@contextmanager
def _connected(asked: LinkDirection, direction: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection through a relay, the sending end first."""
    with socket.create_server(("127.0.0.1", 0)) as station:
        server = "tcp://{}:{}".format(*station.getsockname())
        up, down = (asked, LinkDirection()) if direction == "up" else (LinkDirection(), asked)
        with serving(relay_command(server, up, down)) as relay:
            device = socket.create_connection(endpoint(relay.address))
            accepted, _ = station.accept()
            with device, accepted:
                for end in (device, accepted):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                yield (device, accepted) if direction == "up" else (accepted, device)


def _delays(source: socket.socket, sink: socket.socket) -> list[float]:
    """Delays of small messages in seconds, each sent after the previous one has arrived."""
    delays = []
    for _ in range(PROBES):
        source.sendall(_TIMESTAMP.pack(time.monotonic()).ljust(_PROBE_BYTES))
        data = _receive(sink, _PROBE_BYTES)
        delays.append(time.monotonic() - _TIMESTAMP.unpack_from(data)[0])
    return delays


def _rate(source: socket.socket, sink: socket.socket, bits_per_second: float) -> float:
    """Bits per second of a long message, from its first piece to its last."""
    size = max(4 * PIECE, int(bits_per_second / 8 * _RATE_SECONDS))
    sender = threading.Thread(target=source.sendall, args=(bytes(size),), daemon=True)
    sender.start()
    first = len(sink.recv(PIECE))
    began = time.monotonic()
    _receive(sink, size - first)
    seconds = time.monotonic() - began
    sender.join()
    return 8 * (size - first) / seconds


def _receive(sink: socket.socket, size: int) -> bytes:
    parts, missing = [], size
    while missing:
        part = sink.recv(min(missing, 1 << 20))
        assert part, "the relay closed the connection"
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
