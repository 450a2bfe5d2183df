"""What one peer sends is bounded in time and memory, and the others are served meanwhile."""

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from basestation.devices.router import ReceivedMessage, Router
from basestation.engine.inbox import Inbox, Task
from basestation.kv_cache import memory_guard
from basestation.kv_cache.heap import return_free_memory
from basestation.kv_cache.memory_guard import MemoryGuard
from basestation.server import Server
from basestation.sessions.session import Session
from protocol.errors import OverloadError
from protocol.full_distribution import FullDistribution
from protocol.limits import Limits
from protocol.messages import Draft, Fault, Mode, Open, Opened, Sampling, Verdict, Welcome
from tests.fakes import TARGET, VOCAB, FakeTarget
from tests.link_pair import Station
from tests.raw_device import CODEC, RawDevice, hello
from tests.relay import port_of
from tests.serving import ANY_PORT, serving
from tests.wait import wait_for

MIB = 2**20


def do_nothing() -> None:
    pass


@contextmanager
def dealer(address: str) -> Iterator["zmq.Socket[bytes]"]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as one:
        one.setsockopt(zmq.ROUTING_ID, b"\x01" + os.urandom(7))
        one.setsockopt(zmq.LINGER, 0)
        one.connect(address)
        yield one


def greets(one: "zmq.Socket[bytes]", seconds: float = 20) -> bool:
    """Whether a Hello is answered."""
    one.send(CODEC.encode(hello(VOCAB)))
    return bool(one.poll(int(seconds * 1000))) and isinstance(CODEC.decode(one.recv()), Welcome)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# -- the socket --


@contextmanager
def router(max_frame_bytes: int, max_reply_bytes: int = 1000) -> Iterator[Router]:
    with zmq.Context() as context:
        one = Router(context, "tcp://127.0.0.1:0", max_frame_bytes, max_reply_bytes, None)
        yield one
        one.close()


def test_a_turn_ends_after_some_megabytes_so_that_replies_are_sent_in_between() -> None:
    with router(2 * MIB) as one, dealer(one.address) as device:
        for _ in range(20):
            device.send(bytes(MIB))
        turns: list[int] = []
        while sum(turns) < 20:
            one.socket.poll(5000)
            turns.append(len(list(one.receive())))
        assert max(turns) <= 4


def test_a_message_of_many_parts_takes_several_turns_and_keeps_one_part() -> None:
    parts = 20_000
    with router(2 * MIB) as one, dealer(one.address) as device:
        device.send_multipart([b"part"] * parts)
        messages: list[ReceivedMessage] = []
        turns = 0
        while not messages:
            one.socket.poll(5000)
            messages, turns = list(one.receive()), turns + 1
        assert turns > 1
        assert (messages[0].parts, messages[0].first) == (parts, b"part")
        assert messages[0].size == parts * len(b"..part")


def test_what_is_queued_for_a_device_that_does_not_read_is_bounded_in_bytes_and_the_rest_is_dropped() -> None:
    reply_bytes, sent = 100_000, 1000
    with router(MIB, reply_bytes) as one, zmq.Context() as context, context.socket(zmq.DEALER) as device:
        for option, value in ((zmq.LINGER, 0), (zmq.RCVHWM, 1), (zmq.RCVBUF, 100_000)):
            device.setsockopt(option, value)
        device.connect(one.address)
        device.send(b"request")
        assert one.socket.poll(20_000)
        (message,) = one.receive()
        for number in range(sent):
            one.send(message.address, number.to_bytes(4, "big") + bytes(reply_bytes - 4))
        numbers = list[int]()
        while device.poll(1000):
            numbers.append(int.from_bytes(device.recv()[:4], "big"))
        one.send(message.address, b"later")
        assert device.poll(20_000)
        assert device.recv() == b"later"
    assert numbers[:10] == list(range(10))
    assert len(numbers) * reply_bytes < 50 * MIB < sent * reply_bytes


def test_a_late_event_of_a_connection_closes_nothing_else_that_has_its_descriptor_now(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    others = list[int]()

    def with_another_descriptor(monitor: "zmq.Socket[bytes]") -> dict[str, int]:
        recv_monitor_message(monitor)
        return {"value": others.pop()}

    monkeypatch.setattr("basestation.devices.router.recv_monitor_message", with_another_descriptor)
    with (
        router(MIB) as one,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as here,
        listener.accept()[0] as there,
        (tmp_path / "log").open("wb") as log,
    ):
        for other in (there.fileno(), log.fileno()):
            others.append(other)
            with dealer(one.address):
                assert one.connections.poll(20_000)
                before = open_descriptors()
                one.accept(accepting=False)
                assert open_descriptors() == before
        there.sendall(b"open")
        assert here.recv(4) == b"open"


# -- the queue to the engine --


def test_an_owners_queued_bytes_are_bounded_and_free_again_when_its_tasks_are_taken() -> None:
    inbox = Inbox(max_bytes=100)
    assert [inbox.put(do_nothing, "a", 40) for _ in range(4)] == [True, True, False, False]
    assert inbox.put(do_nothing, "b", 100)
    assert inbox.put(do_nothing, "a")
    for _ in range(3):
        assert inbox.get(0) is not None
    assert [inbox.put(do_nothing, "a", 50) for _ in range(3)] == [True, True, False]


def test_waking_makes_a_waiting_get_return() -> None:
    inbox = Inbox(max_bytes=1)
    threading.Timer(0.1, inbox.wake).start()
    assert inbox.get(1000) is None


def test_owners_take_turns_and_the_base_stations_own_tasks_always_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("basestation.engine.inbox._MAX_TASKS", 6)
    monkeypatch.setattr("basestation.engine.inbox._MAX_TASKS_OF_OWNER", 4)
    inbox, done = Inbox(max_bytes=100), list[str]()
    assert [inbox.put(partial(done.append, f"flood {number}"), "flood") for number in range(5)] == [True] * 4 + [False]
    assert [inbox.put(partial(done.append, f"other {number}"), "other") for number in range(3)] == [True, True, False]
    assert inbox.put(partial(done.append, "own"), always=True)
    assert inbox.put(partial(done.append, "flood revoked"), "flood", always=True)
    while task := inbox.get(0):
        task()
    assert done == ["flood 0", "other 0", "own", "flood 1", "other 1", "flood 2", "flood 3", "flood revoked"]


# -- the server --


def test_bytes_beyond_the_rate_are_dropped_with_the_limits_name_and_others_are_served() -> None:
    limits = Limits(max_bytes_per_second=50_000)
    prompt = CODEC.encode(Open(0, 0, Mode.IDS, Sampling(), (1,) * 90_000))
    with (
        serving(Server(FakeTarget.make(TARGET), ANY_PORT, limits)) as server,
        dealer(server.address) as greedy,
        dealer(server.address) as other,
    ):
        assert greets(greedy)
        faults: list[Fault] = []
        for _ in range(3):
            greedy.send(prompt)
            assert greedy.poll(20_000)
            reply = CODEC.decode(greedy.recv())
            assert isinstance(reply, Fault)
            faults.append(reply)
        assert [fault.code for fault in faults] == ["context_length", "context_length", "limit"]
        assert faults[-1].text == "more bytes a second exceeds the base station's --max-bytes-per-second of 50000"
        assert greets(other)


def test_a_queued_message_counts_for_its_owner_with_the_bytes_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    put, sizes = Inbox.put, dict[str, int]()

    def recording(self: Inbox, task: Task, owner: str = "", size: int = 0) -> bool:
        sizes[owner] = max(size, sizes.get(owner, 0))
        return put(self, task, owner, size)

    monkeypatch.setattr(Inbox, "put", recording)
    with serving(Server(FakeTarget.make(TARGET), ANY_PORT)) as server, dealer(server.address) as device:
        assert greets(device)
        device.send(CODEC.encode(Open(0, 0, Mode.IDS, Sampling(), (1,) * 1000)))
        assert device.poll(20_000)
        owner = bytes(cast(bytes, device.getsockopt(zmq.ROUTING_ID))).hex()
    assert sizes[owner] >= 8 * 1000


# -- the sessions --

WIDE = 1024
FULL = FullDistribution.quantize(np.full(WIDE, 1 / WIDE))


def full_draft(session_id: int, round_id: int, count: int) -> Draft:
    return Draft(session_id, round_id, (5,) * count, (FULL,) * count, None if round_id == 1 else 5)


def test_full_drafts_are_held_in_fp16_and_only_up_to_the_limit() -> None:
    frame_bytes = 2 * WIDE * 8
    limits = Limits(max_held_bytes=3 * frame_bytes, window=4)
    table = np.zeros((WIDE, 1, WIDE), np.float32)
    station = Station(FakeTarget.make(np.broadcast_to(table, (WIDE, WIDE, WIDE))), limits)
    device, other = RawDevice(station), RawDevice(station, b"b")
    for one, count in ((device, 2), (other, 1)):
        for session_id in range(count):
            opening = Open(session_id, 0, Mode.FULL, Sampling(1.0), (1, 2))
            assert one.request(opening) == Opened(session_id, 0)
    first = sessions(station)[0]
    for round_id in (1, 2):
        station.push(b"a", station.codec.encode(full_draft(0, round_id, 8)))
    assert 2 * frame_bytes <= first.held_bytes < 2.1 * frame_bytes
    station.push(b"a", station.codec.encode(full_draft(1, 1, 8)))
    (fault,) = station.outboxes[b"a"]
    assert isinstance(fault, Fault)
    assert (fault.session_id, fault.code) == (1, "limit")
    assert "exceeds the base station's --max-held-bytes of" in fault.text
    station.outboxes[b"a"].clear()
    assert isinstance(other.request(full_draft(0, 1, 8)), Verdict)
    assert isinstance(device.receive(), Verdict)


def test_a_repeated_draft_is_not_counted_twice() -> None:
    limits = Limits(max_held_bytes=2 * WIDE * 8 + 1000, window=4)
    table = np.zeros((WIDE, 1, WIDE), np.float32)
    station = Station(FakeTarget.make(np.broadcast_to(table, (WIDE, WIDE, WIDE))), limits)
    device = RawDevice(station)
    device.request(Open(0, 0, Mode.FULL, Sampling(1.0), (1, 2)))
    for _ in range(5):
        station.push(b"a", station.codec.encode(full_draft(0, 1, 8)))
    assert isinstance(device.receive(), Verdict)


def sessions(station: Station) -> list[Session]:
    found: list[Session] = vars(station.engine)["_sessions"].all()
    return found


# -- resident memory --


def test_the_guard_refuses_connections_at_half_and_ends_the_process_beyond_all() -> None:
    resident = iter([100, 149, 151, 190, 149, 201])
    guard = MemoryGuard(expected=100, for_peers=100, resident=lambda: next(resident))
    accepting = []
    for _ in range(5):
        guard.check()
        accepting.append(guard.accepting)
    assert accepting == [True, True, False, False, True]
    with pytest.raises(OverloadError, match=r"are resident; allowed: .*--peer-memory; .*start the base station again"):
        guard.check()


def test_the_guard_returns_free_memory_to_the_system_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[bool] = []
    monkeypatch.setattr(memory_guard, "return_free_memory", lambda: returned.append(True))
    guard = MemoryGuard(expected=100, for_peers=100, resident=lambda: 100)
    for _ in range(3):
        guard.check()
    assert returned == [True]
    return_free_memory()


def test_new_connections_are_refused_while_memory_is_short_and_open_ones_continue() -> None:
    resident = [0]
    guard = MemoryGuard(expected=0, for_peers=100, resident=lambda: resident[0])
    server = Server(FakeTarget.make(TARGET), ANY_PORT, memory_guard=guard)
    with serving(server), dealer(server.address) as early:
        assert greets(early)
        resident[0] = 60
        wait_for(lambda: not guard.accepting)
        with dealer(server.address) as late:
            assert not greets(late, seconds=1)
            assert greets(early)
            resident[0] = 0
            wait_for(lambda: guard.accepting)
            wait_for(lambda: greets(late, seconds=1))


def test_a_message_of_endless_parts_ends_the_process_and_not_the_machine() -> None:
    guard = MemoryGuard.of_process(kv_bytes=0, for_peers=150 * MIB)
    server = Server(FakeTarget.make(TARGET), ANY_PORT, memory_guard=guard)
    failures: list[Exception] = []

    def serve() -> None:
        try:
            server.serve()
        except OverloadError as error:
            failures.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    end = time.monotonic() + 120
    while thread.is_alive() and time.monotonic() < end:  # a slow machine ends the connection before memory is short
        send_endless_message(server.address, most=2000 * MIB)
        thread.join(1)
    server.stop()
    thread.join(30)
    assert len(failures) == 1


def send_endless_message(address: str, most: int) -> None:
    """Send parts of 64 KiB, each announcing another, until the connection ends, or until ``most`` bytes are sent."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    properties = _property(b"Socket-Type", b"DEALER") + _property(b"Identity", b"")
    ready = b"\x05READY" + properties
    part = b"\x03" + struct.pack(">Q", 2**16) + bytes(2**16)
    sent = 0
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port_of(address)), timeout=20) as connection,
    ):
        connection.sendall(greeting)
        connection.sendall(bytes([4, len(ready)]) + ready)
        while sent < most:
            connection.sendall(part * 16)
            sent += len(part) * 16


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
