"""Mutated frames decode or raise ProtocolError, in memory and time bounded by the frame's size.

Frames of all versions are mutated as bytes and as values. Generation is seeded, so a
failure is reproducible: keep its seed in ``SEEDS``.
"""

import random
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgpack
import pytest

from protocol.draft_codec import EncodedDraft, decode_drafted
from protocol.errors import ProtocolError
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import OLDEST_VERSION, PROTOCOL_VERSION
from tests.vectors import recorded_vectors

FRAMES_A_SEED = 50_000
TIMEOUT = 120  # seconds for all frames of a seed, which take a few
SEEDS = range(20)
TIGHT = Limits(max_prompt_len=64, max_draft_len=8, max_uplink_k=32)
ODD_NUMBERS = (0, 1, -1, 2, 127, 128, 255, 256, 2**16, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, -(2**63))
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    1.5,
    float("nan"),
    "",
    b"",
    [],
    {},
    "a" * 300,
    bytes(300),
    [[[]]],
    msgpack.Timestamp(1),
)
CORPUS = [
    (vector["vocab_size"], bytes.fromhex(vector["frame"]))
    for version in range(OLDEST_VERSION, PROTOCOL_VERSION + 1)
    for vector in recorded_vectors(version)["frames"]
]


class Mutator:
    """Mutates frames of the corpus, as a function of a seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)  # noqa: S311
        self.bytewise: list[Callable[[bytearray], None]] = [self.flip, self.cut, self.insert, self.repeat, self.splice]

    def frame(self) -> tuple[int, bytes]:
        """A vocabulary size and a frame for it."""
        vocab_size, frame = self.chance.choice(CORPUS)
        if self.chance.random() < 0.5:
            values = msgpack.unpackb(frame)
            for _ in range(self.chance.randint(1, 3)):
                values = self.alter(values)
            return vocab_size, msgpack.packb(values)
        mutated = bytearray(frame)
        for _ in range(self.chance.randint(1, 4)):
            self.chance.choice(self.bytewise)(mutated)
        return vocab_size, bytes(mutated)

    def flip(self, frame: bytearray) -> None:
        if frame:
            frame[self.chance.randrange(len(frame))] ^= 1 << self.chance.randrange(8)

    def cut(self, frame: bytearray) -> None:
        start = self.chance.randint(0, len(frame))
        del frame[start : start + self.chance.randint(1, 16)]

    def insert(self, frame: bytearray) -> None:
        index = self.chance.randint(0, len(frame))
        frame[index:index] = self.chance.randbytes(self.chance.randint(1, 8))

    def repeat(self, frame: bytearray) -> None:
        start = self.chance.randint(0, len(frame))
        frame[start:start] = frame[start : start + self.chance.randint(1, 64)]

    def splice(self, frame: bytearray) -> None:
        other = self.chance.choice(CORPUS)[1]
        frame[self.chance.randint(0, len(frame)) :] = other[self.chance.randint(0, len(other)) :]

    def alter(self, value: Any) -> Any:
        """Change one value, at any depth, or the number of values."""
        if isinstance(value, list) and value and self.chance.random() < 0.9:
            index = self.chance.randrange(len(value))
            if self.chance.random() < 0.1:
                return self.chance.choice([value[:index], [*value, value[index]], value[index:]])
            return [*value[:index], self.alter(value[index]), *value[index + 1 :]]
        if isinstance(value, bytes) and self.chance.random() < 0.7:
            mutated = bytearray(value)
            self.chance.choice(self.bytewise)(mutated)
            return bytes(mutated)
        if isinstance(value, int) and self.chance.random() < 0.5:
            return min(max(value + self.chance.randint(-3, 3), -(2**63)), 2**64 - 1)
        return self.chance.choice([*ODD_NUMBERS, *ODD_VALUES])


CODECS = {size: (FrameCodec(size), FrameCodec(size, TIGHT)) for size, _ in CORPUS}


def decode(vocab_size: int, frame: bytes) -> bool:
    """Decode as a device, as a base station with tight limits, and as the bits of encoding ``sparse``.

    Returns:
        Whether one of the first two is possible.
    """
    is_valid = False
    for codec in CODECS[vocab_size]:
        with suppress(ProtocolError):
            message = codec.decode(frame)
            assert codec.decode(codec.encode(message)) == message
            is_valid = True
    with suppress(ProtocolError):
        draft_len, entries, steps = (1 + byte for byte in frame[:3].ljust(3, b"\0"))
        decode_drafted(EncodedDraft(draft_len, entries, steps, frame[3:]), vocab_size)
    return is_valid


def run(seed: int) -> None:
    mutator = Mutator(seed)
    valid = sum(decode(*mutator.frame()) for _ in range(FRAMES_A_SEED))
    assert 0 < valid < FRAMES_A_SEED


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize("seed", SEEDS)
def test_one_million_mutated_frames_decode_or_raise_protocol_error(seed: int) -> None:
    run(seed)


def test_decoding_memory_is_proportional_to_the_frame() -> None:
    mutator = Mutator(seed=9)
    frames = [mutator.frame() for _ in range(2000)]
    for vocab_size, frame in frames:
        decode(vocab_size, frame)  # allocate what is cached
    tracemalloc.start()
    try:
        for vocab_size, frame in frames:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            decode(vocab_size, frame)
            used = tracemalloc.get_traced_memory()[1] - before
            assert used < 300_000 + 400 * len(frame)  # msgpack allocates a buffer of 256 KB
    finally:
        tracemalloc.stop()
