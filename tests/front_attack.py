"""A front whose ROUTER assigns routing ids from a known number on, and a device that claims the next one.

Runs in the front's process, so it imports no PyTorch. libzmq draws the first id from
``rand`` of the C library; an attacker would have to guess it.
"""

import contextlib
import ctypes
import struct
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import zmq

from basestation.devices.router import Router
from basestation.replicas.front_process import FrontSettings, run_front
from device.link.curve_keys import CurveKeys

_SEED = 7


def run_front_with_known_ids(settings: FrontSettings, connection: Connection) -> None:
    """Like ``run_front``; each ROUTER for devices starts from the same id."""
    make = Router.__init__

    def make_seeded(self: Router, *arguments: Any) -> None:
        ctypes.CDLL(None).srand(_SEED)
        make(self, *arguments)

    Router.__init__ = make_seeded  # type: ignore[method-assign, assignment]
    run_front(settings, connection)


def next_routing_id() -> bytes:
    """The first id that such a front assigns."""
    libc = ctypes.CDLL(None)
    libc.srand(_SEED)
    low, high = libc.rand(), libc.rand()
    return b"\0" + struct.pack(">I", (low | high << 31) & 0xFFFFFFFF)


@contextlib.contextmanager
def hostile_socket(address: str, keys: CurveKeys, routing_id: bytes = b"") -> "Iterator[zmq.Socket[bytes]]":
    """A connection of a device with modified software; without a routing id the front assigns one."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.RECONNECT_IVL, 60_000)  # not to the next front, which counts from the same id
        if routing_id:
            socket.setsockopt(zmq.ROUTING_ID, routing_id)
        keys.protect(socket)
        socket.connect(address)
        yield socket
    finally:
        context.destroy(linger=0)


def attack(address: str, keys: CurveKeys, seconds: float) -> bool:
    """Claim the next id, and connect once more without one; whether the front let the first connection in."""
    with hostile_socket(address, keys, next_routing_id()) as claiming:
        claiming.send(b"")  # answered by a Fault
        if not claiming.poll(round(1000 * seconds)):
            return False
        with hostile_socket(address, keys) as nameless:
            nameless.send(b"")
            nameless.poll(round(1000 * seconds))
    return True
