"""Test vectors of the protocol, which a client in another language must reproduce.

``docs/vectors/version-N.json`` holds the vectors of protocol version N. A file is
written once, by the code of its version (``python -m tests.vectors FILE``), and its
bytes never change.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from protocol.coupling import PositionNoise
from protocol.frames import FrameCodec
from protocol.full_distribution import FullDistribution
from protocol.logprobs import TokenLogprobs
from protocol.messages import (
    PROTOCOL_VERSION,
    Close,
    Decode,
    Draft,
    Encoding,
    Extend,
    Fault,
    Hello,
    Message,
    Mode,
    Open,
    Opened,
    Resume,
    Resumed,
    Sampling,
    Verdict,
    Welcome,
)
from protocol.randomness import Stream, random_bits, random_word
from protocol.sparse import SparseDistribution
from tests.fakes import FakeTarget, Table
from tests.link_pair import Station
from tests.raw_device import hello

FOLDER = Path(__file__).parents[1] / "docs" / "vectors"
Vector: TypeAlias = dict[str, Any]
LARGE_VOCAB = 49_152
SIZES = (300, LARGE_VOCAB)
SEEDS = (0, 7, 2**63 - 1)
VOCAB = 12
CODEC = FrameCodec(VOCAB)


def block_draft(round_id: int, first_drafted: int) -> Draft:
    """A Draft of session 9, which has block verification and the seed 5."""
    sent = SparseDistribution.quantize(VOCAB, np.array([0, 3, 4, 7]), np.array([0.4, 0.3, 0.2, 0.1]), 96)
    bits = [random_bits(5, first_drafted + index, Stream.DRAFT, first_drafted) for index in range(3)]
    return Draft(9, round_id, tuple(map(sent.sample, bits)), (sent,) * 3)


REQUESTS: list[Message] = [
    Open(5, 0, Mode.IDS, Sampling(), (2, 7)),
    Draft(5, 1, (0, 1, 6)),
    Draft(5, 2, (0, 8)),
    Draft(5, 2, (0, 8)),
    Draft(5, 3, (6,)),
    Draft(5, 4, (0,), assumed_bonus=3),
    Draft(5, 4, (0,), assumed_bonus=7),
    Draft(5, 5, (7,), assumed_bonus=1),
    Resume.of(5, 5, (2, 7, 0, 1, 6, 7, 0, 1, 6, 7, 0, 1)),
    Decode(5, 6, 2),
    Extend(5, 8, 4, (0,)),
    Draft(5, 9, (1, 4)),
    Close(5),
    Draft(5, 10, ()),
    Open(6, 0, Mode.COUPLED, Sampling(0.8, seed=7), (2, 7)),
    Decode(6, 1, 3),
    Extend(6, 4, 2, (7, 1), Sampling(1.5, top_k=6, seed=11)),
    Decode(6, 5, 3),
    Extend(6, 8, 3, (1, 5)),
    Decode(6, 9, 2),
    Close(6),
    Open(7, 0, Mode.IDS, Sampling(presence_penalty=2.0, logit_bias=((9, 2.5),), stop_token_ids=(3,)), (2, 7), 1),
    Decode(7, 1, 8),
    Extend(7, 5, 1, (4,), Sampling(1.0, seed=3, min_p=0.4, min_tokens=2, stop_token_ids=(9,))),
    Decode(7, 6, 6),
    Close(7),
    Open(8, 0, Mode.TARGET, Sampling(logprobs=2), (2,)),
    Draft(8, 1, (7, 0, 3), given=True),
    Extend(8, 2, 3, (3,)),
    Draft(8, 3, (9,), given=True),
    Close(8),
    Open(9, 0, Mode.TOPK, Sampling(1.0, seed=5), (2, 7), block_verification=True),
    *(block_draft(round_id, first) for round_id, first in enumerate((2, 3, 7, 8, 9, 10, 11, 12, 14), start=1)),
    Close(9),
]


def messages(vocab_size: int) -> list[Message]:
    """At least one message of every kind."""
    last = vocab_size - 1
    support = np.array([3, 17, 40, last])
    one = SparseDistribution.quantize(vocab_size, support, np.array([0.5, 0.25, 0.15, 0.1]), 96)
    other = SparseDistribution.quantize(vocab_size, np.array([5]), np.ones(1), 96)
    fp16 = np.zeros(vocab_size)
    fp16[[2, 9, last]] = 0.5, 0.375, 0.125
    full = FullDistribution.quantize(fp16)
    modes = (Mode.IDS, Mode.TOPK, Mode.FULL, Mode.TARGET, Mode.COUPLED, Mode.TOPP)
    return [
        Hello(PROTOCOL_VERSION, vocab_size, bytes(range(32)), (2, 7)),
        Welcome(PROTOCOL_VERSION, "target", 8192, 64, modes),
        Welcome(PROTOCOL_VERSION, "target", 8192, 64, modes, (Encoding.SPARSE,), 4096, 512, 4, 100, 4),
        Welcome(PROTOCOL_VERSION, "target", 8192, 64, modes, window=4, vocab_size=vocab_size, stop_ids=(2, last)),
        Welcome(PROTOCOL_VERSION, "target", 8192, 64, modes, vocab_size=9, pass_seconds=0.021, row_seconds=0.00075),
        Welcome(PROTOCOL_VERSION, "target", 8192, 64, modes, vocab_size=9, max_grammar_len=65_536),
        Welcome(PROTOCOL_VERSION, "target", 8192, 64, modes, vocab_size=9, block_verification=True),
        *(Open(1, 0, mode, Sampling(0.7, 40, 0.9, SEEDS[-1]), (1, last, 0)) for mode in modes[1:]),
        Open(0, 0, Mode.IDS, Sampling(), (1, 2, 3, 4, 5)),
        Opened(1, 0),
        Extend(1, 9, 300, (4, 5)),
        Extend(1, 10, 300, (4, last), Sampling(0.6, 20, 0.95, 11)),
        Extend(1, 11, 0, (4,), Sampling()),
        Draft(1, 2, ()),
        Draft(1, 2, (5, 0, last)),
        Draft(1, 2, (5, 0, last), assumed_bonus=17),
        Draft(1, 3, (40, 5), (one, other)),
        Draft(1, 3, (40, 5), (one, other), assumed_bonus=0),
        *([Draft(1, 4, (9,), (full,))] if vocab_size < LARGE_VOCAB else []),
        Decode(1, 5, 70_000),
        Verdict(1, 2, 3, last),
        Resume.of(1, 2, (1, last, 0)),
        Resumed(1, 2, 3),
        Close(1),
        Fault(None, "mismatch", "other tokens"),
        Fault(1, "unknown_session", "session 1 is not open"),
        *later_messages(last),
    ]


def later_messages(last: int) -> list[Message]:
    """Messages that are new in versions 5 and 6."""
    return [
        Open(0, 0, Mode.IDS, Sampling(0.5, repetition_penalty=1.5), (1, 2)),
        Open(0, 0, Mode.IDS, Sampling(logit_bias=((3, -100.0), (last, 0.5)), ignore_eos=True), (1, 2, 3), 2),
        Open(0, 0, Mode.IDS, Sampling(grammar='{"grammars": []}'), (1, 2)),
        Extend(1, 12, 0, (4,), Sampling(min_p=0.25, frequency_penalty=-0.5, min_tokens=300, stop_token_ids=(7, last))),
        Draft(1, 5, (5, 0, last), given=True),
        Verdict(1, 2, 0, last, (TokenLogprobs(-0.5, ((last, -0.5), (3, -2.25))),)),
        Open(0, 0, Mode.TOPK, Sampling(0.5), (1, 2), block_verification=True),
    ]


def counting_table() -> Table:
    """The logits of the target in ``conversation``."""
    table = np.zeros((VOCAB,) * 3, np.float32)
    for last in range(VOCAB):
        table[:, last, (5 * last + 1) % VOCAB] = 1
    return table


def describe(value: object) -> Any:
    """A message as JSON: its kind and fields, with bytes in hexadecimal."""
    if isinstance(value, SparseDistribution | FullDistribution):
        kept = np.flatnonzero(value.weights)
        return {"support": value.support[kept].tolist(), "weights": value.weights[kept].tolist(), "total": value.total}
    if is_dataclass(value):
        named = {entry.name: describe(getattr(value, entry.name)) for entry in fields(value)}
        return named if isinstance(value, Sampling) else {"kind": type(value).__name__, **named}
    if isinstance(value, bytes):
        return value.hex()
    return [describe(entry) for entry in value] if isinstance(value, tuple) else value


def frame_vectors() -> list[Vector]:
    """Messages and their frames."""
    return [
        {
            "vocab_size": size,
            "frame": FrameCodec(size).encode(message).hex(),
            "message": describe(message),
        }
        for size in SIZES
        for message in messages(size)
    ]


def word_vectors() -> list[Vector]:
    """The 64-bit words of all random numbers, in hexadecimal."""
    return [
        {"seed": seed, "position": position, "stream": stream, "word": f"{random_word(seed, position, stream):016x}"}
        for seed in SEEDS
        for position in (0, 1, 100_000)
        for stream in Stream
    ]


def block_word_vectors() -> list[Vector]:
    """The 64-bit words of block verification, in hexadecimal."""
    return [
        {
            "seed": seed,
            "position": position,
            "stream": stream,
            "first_drafted": first_drafted,
            "word": f"{random_word(seed, position, stream, first_drafted):016x}",
        }
        for seed in SEEDS
        for position, first_drafted in ((0, 0), (100_000, 100_000), (100_000, 99_997))
        for stream in (Stream.DRAFT, Stream.ACCEPT)
    ]


def drawn_vectors() -> list[Vector]:
    """The token that a device draws from a distribution."""
    one = SparseDistribution.quantize(300, np.array([3, 17, 299]), np.array([0.5, 0.3, 0.2]), 100)
    return [
        {
            "distribution": describe(one),
            "seed": seed,
            "position": position,
            "token_id": one.sample(random_bits(seed, position, Stream.DRAFT)),
        }
        for seed in SEEDS
        for position in range(8)
    ]


def noise_vectors() -> list[Vector]:
    """The noise of some tokens in mode ``coupled``, and the choice among the logits −id / 64."""
    ids = np.array([0, 1, 255, 256, 299])
    return [
        {
            "vocab_size": 300,
            "seed": seed,
            "position": position,
            "token_ids": ids.tolist(),
            "noise": PositionNoise(seed, position, 300).of(ids).tolist(),
            "chosen": PositionNoise(seed, position, 300).choose(np.arange(300, dtype=np.float32) / -64)[0],
        }
        for seed in SEEDS
        for position in range(4)
    ]


def conversation() -> list[Vector]:
    """The frames of a device and a base station; the target's logit of (5 · last token + 1) mod 12 is 1, others 0."""
    replies = replies_of(Station(FakeTarget.make(counting_table())))
    frames = [CODEC.encode(hello(VOCAB)), *map(CODEC.encode, REQUESTS)]
    return [{"device": frame.hex(), "station": replies(frame)} for frame in frames]


def replies_of(station: Station) -> Callable[[bytes], list[str]]:
    """A function that sends a device's frame to a base station and returns the replies."""

    def replies(frame: bytes) -> list[str]:
        station.push(b"a", frame)
        received = []
        while (message := station.pull(b"a")) is not None:
            received.append(CODEC.encode(message).hex())
        return received

    return replies


def all_vectors() -> Vector:
    """All vectors of a file."""
    return {
        "version": PROTOCOL_VERSION,
        "frames": frame_vectors(),
        "random_words": word_vectors(),
        "block_random_words": block_word_vectors(),
        "drawn_tokens": drawn_vectors(),
        "noise": noise_vectors(),
        "conversation": conversation(),
    }


def recorded_vectors(version: int) -> Vector:
    """The vectors of a version, by name."""
    vectors: Vector = json.loads((FOLDER / f"version-{version}.json").read_text("utf-8"))
    return vectors


def write(path: Path) -> None:
    """Write a file with one vector per line."""
    version, *lists = all_vectors().items()
    parts = [f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, vectors)) + "\n ]" for name, vectors in lists]
    path.write_text("{\n" + ",\n".join([f' "version": {version[1]}', *parts]) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
