"""Hostile peers: each repeats one kind of attack until the test ends."""

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeAlias

import msgpack
import numpy as np
import zmq

from device.link.curve_keys import CurveKeys
from protocol.draft_codec import encode_drafted
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import Close, Decode, Draft, Extend, Fault, Hello, Message, Mode, Open, Resume, Sampling, Verdict
from protocol.sparse import SparseDistribution
from tests.relay import port_of

_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(47)  # ZMTP 3 (RFC 23)
_PAUSE = 0.02
_BURST = 1500
_SEND_TIMEOUT_MS = 500


@dataclass(frozen=True)
class AttackedStation:
    """The attacked base station: ``keys`` are those of an enrolled device, if any; ``hello`` is valid."""

    address: str
    hello: Hello
    keys: CurveKeys | None
    unknown_keys: CurveKeys | None

    @property
    def codec(self) -> FrameCodec:
        return FrameCodec(self.hello.vocab_size, Limits(max_uplink_k=10**6))

    @contextmanager
    def dealer(self, keys: CurveKeys | None) -> Iterator["zmq.Socket[bytes]"]:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.SNDTIMEO, _SEND_TIMEOUT_MS)  # a refused peer may have no connection
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
        return socket.create_connection(("127.0.0.1", port_of(self.address)), timeout=5)


Attack: TypeAlias = Callable[[AttackedStation, random.Random], None]


def garbage(station: AttackedStation, chance: random.Random) -> None:
    """Random bytes in any number of message parts."""
    with station.dealer(station.keys) as dealer:
        for _ in range(50):
            parts = [chance.randbytes(chance.choice([0, 1, 20, 3000])) for _ in range(chance.choice([1, 1, 1, 4]))]
            dealer.send_multipart(parts)
        _discard_replies(dealer)


def half_frames(station: AttackedStation, chance: random.Random) -> None:
    """A connection that ends inside a greeting or a frame, or announces more bytes than it sends."""
    with station.tcp() as connection:
        connection.sendall(_GREETING[: chance.randint(0, len(_GREETING))])
        if chance.random() < 0.5:
            connection.sendall(b"\x02" + struct.pack(">Q", chance.choice([10, 2**31, 2**63 - 1])) + b"half")
        time.sleep(_PAUSE)


def idle_connections(station: AttackedStation, chance: random.Random) -> None:
    """Connections that send nothing."""
    connections = [station.tcp() for _ in range(20)]
    time.sleep(chance.uniform(0.2, 1))
    for connection in connections:
        connection.close()


def unknown_keys(station: AttackedStation, _: random.Random) -> None:
    """Keys that are not enrolled, no keys for a base station with keys, or keys for one without."""
    for keys in (station.unknown_keys, None):
        with station.dealer(keys) as dealer:
            dealer.send(station.codec.encode(station.hello))
            _discard_replies(dealer)


def wrong_rounds(station: AttackedStation, chance: random.Random) -> None:
    """Rounds that are repeated, omitted and out of order, and sessions that do not exist."""
    session = chance.randrange(100)
    messages: list[Message] = [
        _open(session),
        *(Draft(session, chance.randrange(12), (1, 2), assumed_bonus=chance.choice([None, 3])) for _ in range(12)),
        Decode(session, chance.randrange(5), 2**32 - 1),
        Extend(session, 3, 2**32 - 1, (1,)),
        Resume(session, 2**32 - 1, 2**32 - 1, bytes(8)),
        Verdict(session, 1, 5, 1),
        Fault(session, "closing", "x" * 900),
        Draft(10**6, 1, (1,)),
    ]
    chance.shuffle(messages)
    with station.dealer(station.keys) as dealer:
        for message in [station.hello, _open(session), *messages, *messages, Close(session)]:
            dealer.send(station.codec.encode(message))
        _discard_replies(dealer)


def wrong_distributions(station: AttackedStation, chance: random.Random) -> None:
    """Invalid ids, probabilities and sets, sums other than 1, and sizes beyond every limit."""
    session, vocab_size, codec = chance.randrange(100), station.hello.vocab_size, station.codec
    head = [5, session, 1]
    ids = msgpack.unpackb(codec.encode(Draft(0, 1, (1,))))[3]
    fp16 = np.full(vocab_size, chance.choice([np.nan, np.inf, -1.0, 0.0, 2.0, 1.0]), "<f2")
    uniform = SparseDistribution.quantize(vocab_size, np.arange(4), np.full(4, 0.25), 96)
    encoded = encode_drafted((0, 1), (uniform, uniform))
    damaged = bytearray(encoded.data)
    damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    frames = [
        FrameCodec(2**20).encode(Draft(session, 1, (vocab_size, 2**20 - 1))),
        msgpack.packb([*head, ids, fp16.tobytes()]),
        msgpack.packb([*head, ids, fp16.tobytes()[:-1]]),
        msgpack.packb([*head, 2, encoded.entries, encoded.steps, bytes(damaged)]),
        msgpack.packb([*head, 2, encoded.entries + 1, encoded.steps, encoded.data]),
        msgpack.packb([*head, 2**63, 2**64 - 1, 2**64 - 1, b""]),
        msgpack.packb([*head, 64, 4096 * 64, 2**24, b"\xff" * 9]),
        msgpack.packb([2, session + 1, 0, 1, struct.pack("<dIdQ", float("nan"), 0, 2.0, 2**63), ids]),
    ]
    with station.dealer(station.keys) as dealer:
        opening = replace(_open(session), mode=Mode.TOPK, sampling=Sampling(1.0))
        for frame in (codec.encode(station.hello), codec.encode(opening), *frames):
            dealer.send(frame)
        _discard_replies(dealer)


def flood(station: AttackedStation, _: random.Random) -> None:
    """Requests far beyond the rate limit, each of which would cost a forward pass."""
    with station.dealer(station.keys) as dealer:
        dealer.send(station.codec.encode(station.hello))
        dealer.send(station.codec.encode(_open(0)))
        for round_id in range(_BURST):
            with suppress(zmq.Again):
                dealer.send(station.codec.encode(Draft(0, 1 + round_id, (1, 2, 3))), zmq.NOBLOCK)
        _discard_replies(dealer)


ATTACKS: tuple[Attack, ...] = (
    garbage,
    half_frames,
    idle_connections,
    unknown_keys,
    wrong_rounds,
    wrong_distributions,
    flood,
)


@contextmanager
def attacked(station: AttackedStation, attacks: Sequence[Attack] = ATTACKS) -> Iterator[dict[str, int]]:
    """Run attacks, each in its own thread; yields the number of runs of each, and raises the first failure."""
    stopping, runs = threading.Event(), {attack.__name__: 0 for attack in attacks}
    failures: list[Exception] = []

    def work(attack: Attack, seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311
        try:
            while not stopping.wait(_PAUSE):
                with suppress(zmq.Again, BrokenPipeError, ConnectionResetError):  # the base station may close it
                    attack(station, chance)
                runs[attack.__name__] += 1
        except Exception as error:  # noqa: BLE001 - raised below, in the thread of the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(attack, seed)) for seed, attack in enumerate(attacks)]
    for thread in threads:
        thread.start()
    try:
        yield runs
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def _open(session: int) -> Open:
    return Open(session, 0, Mode.IDS, Sampling(), (1, 2, 3))


def _discard_replies(dealer: "zmq.Socket[bytes]") -> None:
    """Receive and discard replies until none arrives for 100 ms."""
    while dealer.poll(100):
        dealer.recv()
