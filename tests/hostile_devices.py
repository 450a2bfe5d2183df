"""What an enrolled device could do to hurt others: each of these once had an effect on them."""

import random
import resource
import socket
from contextlib import suppress

import numpy as np
import zmq

from protocol.full_distribution import FullDistribution
from protocol.messages import Close, Decode, Draft, Extend, Fault, Message, Mode, Open, Resume, Sampling, Verdict
from tests.hostile import Attack, AttackedStation

_REPLY_MS = 60_000


def repeated_decodes(station: AttackedStation, chance: random.Random) -> None:
    """A long Decode, whose few bytes are repeated hundreds of times."""
    session = 10**6 + chance.randrange(10**6)
    with station.dealer(station.keys) as dealer:
        _send(station, dealer, station.hello, Open(session, 0, Mode.TARGET, Sampling(), (1, 2, 3)))
        _send(station, dealer, Decode(session, 1, 60))
        received = 0
        while received < 60 and dealer.poll(_REPLY_MS):
            received += isinstance(station.codec.decode(dealer.recv()), Verdict | Fault)
        _send(station, dealer, *[Decode(session, 1, 60)] * 300, Close(session))
        _discard(dealer)


def full_windows(station: AttackedStation, chance: random.Random) -> None:
    """Windows of the largest Drafts of mode ``full``, in many sessions."""
    size, sessions = station.hello.vocab_size, [2 * 10**6 + chance.randrange(10**6) for _ in range(8)]
    ids, uniform = (5,) * 64, (FullDistribution.quantize(np.full(size, 1 / size)),) * 64
    frames = station.codec
    with station.dealer(station.keys) as dealer:
        openings = [Open(session, 0, Mode.FULL, Sampling(1.0), (1, 2, 3)) for session in sessions]
        _send(station, dealer, station.hello, *openings)
        for round_id in range(1, 5):
            for session in sessions:
                with suppress(zmq.Again):
                    draft = Draft(session, round_id, ids, uniform, None if round_id == 1 else 7)
                    dealer.send(frames.encode(draft), zmq.NOBLOCK)
        _discard(dealer)
        _send(station, dealer, *map(Close, sessions))


def kept_prompts(station: AttackedStation, chance: random.Random) -> None:
    """Long prompts, replaced again and again."""
    size, sessions = station.hello.vocab_size, [3 * 10**6 + chance.randrange(10**6) for _ in range(4)]
    prompt = tuple(chance.randrange(size) for _ in range(4000))
    with station.dealer(station.keys) as dealer:
        _send(station, dealer, station.hello)
        for session in sessions:
            _send(station, dealer, Open(session, 0, Mode.IDS, Sampling(), prompt))
            _send(station, dealer, *(Extend(session, round_id, 1, prompt) for round_id in range(1, 20)))
        _discard(dealer)
        _send(station, dealer, *map(Close, sessions))


def orphaned_sessions(station: AttackedStation, chance: random.Random) -> None:
    """As many sessions as allowed, which nobody closes."""
    with station.dealer(station.keys) as dealer:
        _send(station, dealer, station.hello)
        for _ in range(16):
            _send(station, dealer, Open(4 * 10**6 + chance.randrange(10**6), 0, Mode.IDS, Sampling(), (1, 2, 3)))
        _discard(dealer)


def common_prefixes(station: AttackedStation, chance: random.Random) -> None:
    """Many sessions that wait for the prefix that they have in common."""
    size, sessions = station.hello.vocab_size, [5 * 10**6 + chance.randrange(10**6) for _ in range(12)]
    prefix = tuple(chance.randrange(size) for _ in range(1900))
    with station.dealer(station.keys) as dealer:
        _send(station, dealer, station.hello)
        for session in sessions:
            _send(station, dealer, Open(session, 0, Mode.IDS, Sampling(), (*prefix, session % size)))
        _discard(dealer)
        _send(station, dealer, *map(Close, sessions))


def forged_log_lines(station: AttackedStation, _: random.Random) -> None:
    """Faults whose texts contain line breaks, and resumes of sessions that do not exist."""
    with station.dealer(station.keys) as dealer:
        _send(station, dealer, station.hello, Fault(7, "closing", "x\n2026-01-01 peer revoked\x1b[2J" * 9))
        _send(station, dealer, *[Resume(7, 1, 1, bytes(8))] * 50)
        _discard(dealer)


def many_connections(station: AttackedStation, chance: random.Random) -> None:
    """More idle connections than a process may have descriptors by default."""
    connections: list[socket.socket] = []
    with suppress(OSError):
        while len(connections) < 1100:
            connections.append(station.tcp())
    for connection in connections:
        connection.close()


DEVICE_ATTACKS: tuple[Attack, ...] = (
    repeated_decodes,
    full_windows,
    kept_prompts,
    orphaned_sessions,
    common_prefixes,
    forged_log_lines,
    many_connections,
)


def raise_descriptor_limit() -> None:
    """Let this process open as many connections as ``many_connections`` needs."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _send(station: AttackedStation, dealer: "zmq.Socket[bytes]", *messages: Message) -> None:
    for message in messages:
        dealer.send(station.codec.encode(message))


def _discard(dealer: "zmq.Socket[bytes]") -> None:
    """Receive replies until none arrives for a second, at most a few thousand."""
    for _ in range(5000):
        if not dealer.poll(1000):
            return
        dealer.recv()
