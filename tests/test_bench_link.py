"""The relay: arrival times, and complete delivery."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.link.relay import LinkDirection, Outage, Relay, Schedule, parse_outages, relay_command
from bench.setup.server_process import serving
from device.link.probe import endpoint
from protocol.errors import SettingsError

SIZES = st.lists(st.integers(1, 1448), min_size=1, max_size=50)


@given(SIZES, st.floats(1e3, 1e8), st.floats(0, 1))
def test_a_backlog_is_sent_at_the_rate_and_arrives_after_the_delay(sizes: list[int], rate: float, delay: float) -> None:
    schedule = Schedule(LinkDirection(rate, delay))
    due = [schedule.due(5.0, size) for size in sizes]
    sent = 0
    for size, arrival in zip(sizes, due, strict=True):
        sent += size
        assert arrival == pytest.approx(5.0 + 8 * sent / rate + delay)


def test_an_idle_link_accumulates_no_credit() -> None:
    schedule = Schedule(LinkDirection(8000, 0.1))
    assert schedule.due(0.0, 1000) == pytest.approx(1.1)
    assert schedule.due(50.0, 1000) == pytest.approx(51.1)


@given(SIZES)
def test_jitter_is_bounded_and_keeps_the_order(sizes: list[int]) -> None:
    schedule = Schedule(LinkDirection(inf, 0.1, 0.05))
    due = [schedule.due(float(time) / 100, size) for time, size in enumerate(sizes)]
    assert due == sorted(due)
    assert all(0.1 <= arrival - time / 100 <= 0.15 for time, arrival in enumerate(due))


def test_an_outage_interrupts_sending() -> None:
    direction = LinkDirection(8000, 0.0, 0.0, (Outage(10.5, 2.0), Outage(2.0, 1.0)))
    assert Schedule(direction).due(0.0, 1000) == pytest.approx(1.0)
    assert Schedule(direction).due(2.5, 1000) == pytest.approx(4.0)
    assert Schedule(direction).due(10.0, 1000) == pytest.approx(13.0)
    assert Schedule(direction).due(12.5, 1000) == pytest.approx(13.5)
    assert Schedule(direction).due(1.5, 10_000) == pytest.approx(14.5)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("bits_per_second", lambda: LinkDirection(-1)),
        ("bits_per_second", lambda: LinkDirection(0)),
        ("delay_seconds", lambda: LinkDirection(1, -0.1)),
        ("jitter_seconds", lambda: LinkDirection(1, 0, -0.1)),
        ("outage", lambda: LinkDirection(outages=(Outage(-1, 1),))),
        ("outage", lambda: parse_outages(["1"])),
    ],
)
def test_invalid_link_settings_are_refused_by_name(name: str, make: Callable[[], object]) -> None:
    with pytest.raises(SettingsError, match=f"^{name} is "):
        make()


@contextmanager
def connected(up: LinkDirection, down: LinkDirection) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection through a relay in a process of its own, the device's first."""
    with socket.create_server(("127.0.0.1", 0)) as station:
        server = "tcp://{}:{}".format(*station.getsockname())
        with (
            serving(relay_command(server, up, down)) as relay,
            socket.create_connection(endpoint(relay.address)) as device,
        ):
            accepted, _ = station.accept()
            with accepted:
                yield device, accepted


def read_all(source: socket.socket) -> bytes:
    return b"".join(iter(lambda: source.recv(65536), b""))


def test_all_bytes_arrive_in_order_and_not_early_in_both_directions() -> None:
    data = bytes(range(256)) * 400
    up, down = LinkDirection(4e6, 0.05, 0.01), LinkDirection(inf, 0.02, 0.0, (Outage(0.0, 0.5),))
    with connected(up, down) as (device, station):
        for source, sink, direction in ((device, station, up), (station, device, down)):
            began = monotonic()
            sender = threading.Thread(
                target=lambda source=source: (source.sendall(data), source.shutdown(socket.SHUT_WR))
            )
            sender.start()
            assert read_all(sink) == data
            assert monotonic() - began >= 8 * len(data) / direction.bits_per_second + direction.delay_seconds
            sender.join()


def test_a_connection_closed_by_the_base_station_is_closed_for_the_device() -> None:
    with connected(LinkDirection(), LinkDirection()) as (device, station):
        station.close()
        assert device.recv(1) == b""


def test_a_relay_without_a_base_station_closes_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        host, port = unused.getsockname()
    relay = Relay(host, port, LinkDirection(), LinkDirection())
    thread = threading.Thread(target=relay.serve)
    thread.start()
    with socket.create_connection(endpoint(relay.address)) as device:
        assert device.recv(1) == b""
    relay.close()
    thread.join()


def test_a_server_process_can_write_any_amount_of_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "import sys\nprint('serving it at tcp://127.0.0.1:1', file=sys.stderr)\n"
    module += "[print('x' * 100, file=sys.stderr) for _ in range(3000)]\nprint('done', file=open('done', 'w'))\n"
    (tmp_path / "talker.py").write_text(module, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with serving(["talker"]) as served:
        assert served.process.wait(60) == 0
    assert (tmp_path / "done").exists()
