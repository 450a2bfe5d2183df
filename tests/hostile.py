"""Peers that mean harm: each does one kind of it, over and over, until it is told to stop."""

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeAlias

import msgpack
import numpy as np
import zmq

from device.curve_keys import LinkKeys
from protocol.draft_codec import encode_drafted
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import Close, Decode, Draft, Extend, Fault, Hello, Message, Mode, Open, Resume, Sampling, Verdict
from protocol.sparse import SparseDistribution

_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(47)  # ZMTP 3 (RFC 23)
_PAUSE = 0.02
_BURST = 1500
_PATIENCE_MS = 500


@dataclass(frozen=True)
class Ground:
    """Where harm is done: ``keys`` of an enrolled device, or none; ``hello`` would be believed."""

    address: str
    hello: Hello
    keys: LinkKeys | None
    strange_keys: LinkKeys | None

    @property
    def codec(self) -> FrameCodec:
        return FrameCodec(self.hello.vocab_size, Limits(max_uplink_k=10**6))

    @contextmanager
    def dealer(self, keys: LinkKeys | None) -> Iterator["zmq.Socket[bytes]"]:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.SNDTIMEO, _PATIENCE_MS)  # who is refused may have nobody to send to
        dealer.setsockopt(zmq.ROUTING_ID, b"\x01" + os.urandom(15))
        if keys:
            keys.protect(dealer)
        dealer.connect(self.address)
        try:
            yield dealer
        finally:
            dealer.close(linger=0)
            context.destroy(linger=0)

    def tcp(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(self.address.rpartition(":")[2])), timeout=5)


Harm: TypeAlias = Callable[[Ground, random.Random], None]


def garbage(ground: Ground, chance: random.Random) -> None:
    """Bytes that are no frame, in any number of parts."""
    with ground.dealer(ground.keys) as dealer:
        for _ in range(50):
            parts = [chance.randbytes(chance.choice([0, 1, 20, 3000])) for _ in range(chance.choice([1, 1, 1, 4]))]
            dealer.send_multipart(parts)
        _hear(dealer)


def half_frames(ground: Ground, chance: random.Random) -> None:
    """A connection that ends in the middle of a greeting or a frame, or promises more than it sends."""
    with ground.tcp() as connection:
        connection.sendall(_GREETING[: chance.randint(0, len(_GREETING))])
        if chance.random() < 0.5:
            connection.sendall(b"\x02" + struct.pack(">Q", chance.choice([10, 2**31, 2**63 - 1])) + b"half")
        time.sleep(_PAUSE)


def silence(ground: Ground, chance: random.Random) -> None:
    """Connections on which nothing is ever said."""
    connections = [ground.tcp() for _ in range(20)]
    time.sleep(chance.uniform(0.2, 1))
    for connection in connections:
        connection.close()


def strange_keys(ground: Ground, _: random.Random) -> None:
    """Keys that nobody enrolled, or none where keys are asked for, or keys where there are none."""
    for keys in (ground.strange_keys, None):
        with ground.dealer(keys) as dealer:
            dealer.send(ground.codec.encode(ground.hello))
            _hear(dealer)


def wrong_rounds(ground: Ground, chance: random.Random) -> None:
    """Rounds replayed, left out and out of order; sessions that are not there."""
    session = chance.randrange(100)
    said: list[Message] = [
        _open(session),
        *(Draft(session, chance.randrange(12), (1, 2), assumed_bonus=chance.choice([None, 3])) for _ in range(12)),
        Decode(session, chance.randrange(5), 2**32 - 1),
        Extend(session, 3, 2**32 - 1, (1,)),
        Resume(session, 2**32 - 1, 2**32 - 1, bytes(8)),
        Verdict(session, 1, 5, 1),
        Fault(session, "closing", "x" * 900),
        Draft(10**6, 1, (1,)),
    ]
    chance.shuffle(said)
    with ground.dealer(ground.keys) as dealer:
        for message in [ground.hello, _open(session), *said, *said, Close(session)]:
            dealer.send(ground.codec.encode(message))
        _hear(dealer)


def wrong_distributions(ground: Ground, chance: random.Random) -> None:
    """Ids that are none, probabilities that are none, sums other than 1, sets that are none, too much of everything."""
    session, vocab_size, codec = chance.randrange(100), ground.hello.vocab_size, ground.codec
    head = [5, session, 1]
    ids = msgpack.unpackb(codec.encode(Draft(0, 1, (1,))))[3]
    number = np.full(vocab_size, chance.choice([np.nan, np.inf, -1.0, 0.0, 2.0, 1.0]), "<f2")
    even = SparseDistribution.quantize(vocab_size, np.arange(4), np.full(4, 0.25), 96)
    packed = encode_drafted((0, 1), (even, even))
    damaged = bytearray(packed.data)
    damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    frames = [
        FrameCodec(2**20).encode(Draft(session, 1, (vocab_size, 2**20 - 1))),
        msgpack.packb([*head, ids, number.tobytes()]),
        msgpack.packb([*head, ids, number.tobytes()[:-1]]),
        msgpack.packb([*head, 2, packed.entries, packed.steps, bytes(damaged)]),
        msgpack.packb([*head, 2, packed.entries + 1, packed.steps, packed.data]),
        msgpack.packb([*head, 2**63, 2**64 - 1, 2**64 - 1, b""]),
        msgpack.packb([*head, 64, 4096 * 64, 2**24, b"\xff" * 9]),
        msgpack.packb([2, session + 1, 0, 1, struct.pack("<dIdQ", float("nan"), 0, 2.0, 2**63), ids]),
    ]
    with ground.dealer(ground.keys) as dealer:
        opening = replace(_open(session), mode=Mode.TOPK, sampling=Sampling(1.0))
        for frame in (codec.encode(ground.hello), codec.encode(opening), *frames):
            dealer.send(frame)
        _hear(dealer)


def flood(ground: Ground, _: random.Random) -> None:
    """Far more than the rate that is allowed, of requests that cost passes if they are taken."""
    with ground.dealer(ground.keys) as dealer:
        dealer.send(ground.codec.encode(ground.hello))
        dealer.send(ground.codec.encode(_open(0)))
        for round_id in range(_BURST):
            with suppress(zmq.Again):
                dealer.send(ground.codec.encode(Draft(0, 1 + round_id, (1, 2, 3))), zmq.NOBLOCK)
        _hear(dealer)


HARMS: tuple[Harm, ...] = (garbage, half_frames, silence, strange_keys, wrong_rounds, wrong_distributions, flood)


@contextmanager
def attacked(ground: Ground) -> Iterator[dict[str, int]]:
    """All harms at once, each in a thread of its own; how often each was done so far, and what went wrong with it."""
    stopping, done = threading.Event(), {harm.__name__: 0 for harm in HARMS}
    failures: list[Exception] = []

    def work(harm: Harm, seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311
        try:
            while not stopping.wait(_PAUSE):
                with suppress(zmq.Again):
                    harm(ground, chance)
                done[harm.__name__] += 1
        except Exception as error:  # noqa: BLE001 - raised below, in the thread of the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(harm, seed)) for seed, harm in enumerate(HARMS)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def _open(session: int) -> Open:
    return Open(session, 0, Mode.IDS, Sampling(), (1, 2, 3))


def _hear(dealer: "zmq.Socket[bytes]") -> None:
    """Take what comes back in a little while, and forget it."""
    while dealer.poll(100):
        dealer.recv()
