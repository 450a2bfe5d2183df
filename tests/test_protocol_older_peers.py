"""Fields that came later follow the ones that an older peer knows, and take no byte where they are not used."""

import struct
from dataclasses import fields, replace

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.frames import FrameCodec
from protocol.messages import Draft, Encoding, Extend, Fault, Message, Mode, Open, Welcome
from tests.test_protocol_frames import CODEC, KINDS, SAMPLING, frame_of, ids_of, messages, refused, relaxed


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Draft])
@given(st.data())
@settings(relaxed, max_examples=20)
def test_fields_after_the_known_ones_are_ignored(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(messages(kind, 300))
    values = msgpack.unpackb(FrameCodec(300).encode(message))
    left_out = len(fields(kind)) - len(values) + 1
    if left_out == 0:
        assert FrameCodec(300).decode(frame_of(*values, 7, [None], "new")) == message


def test_trailing_fields_that_hold_their_defaults_are_omitted() -> None:
    welcome = Welcome(2, "table", 4096, 64, (Mode.IDS,))
    assert msgpack.unpackb(CODEC.encode(welcome)) == [1, 2, "table", 4096, 64, [0]]
    wider = replace(welcome, max_uplink_k=9)
    assert len(msgpack.unpackb(CODEC.encode(wider))) == 9
    assert CODEC.decode(CODEC.encode(wider)) == wider


def test_retry_seconds_follow_the_fields_that_an_older_device_knows() -> None:
    without = CODEC.encode(Fault(1, "full", "no room"))
    with_retry = CODEC.encode(Fault(1, "full", "no room", 5))
    assert msgpack.unpackb(without) == [9, 1, "full", "no room"]
    assert msgpack.unpackb(with_retry) == [9, 1, "full", "no room", 5]
    assert CODEC.decode(with_retry) == Fault(1, "full", "no room", 5)


def test_sampling_settings_follow_the_fields_of_an_extend_that_an_older_base_station_knows() -> None:
    without, with_sampling = Extend(3, 9, 300, (1, 2)), Extend(3, 9, 300, (1, 2), SAMPLING)
    values = msgpack.unpackb(CODEC.encode(with_sampling))
    assert msgpack.unpackb(CODEC.encode(without)) == values[:5] == [4, 3, 9, 300, ids_of(1, 2)]
    assert values[5:] == [struct.pack("<dIdQ", 0.5, 3, 0.9, 7)]
    assert CODEC.decode(frame_of(*values[:5], None)) == without
    refused(frame_of(*values[:5], struct.pack("<dIdQ", np.nan, 3, 0.9, 7)), "sampling settings: .*; allowed: ")
    refused(frame_of(*values[:5], values[5][:-1]), "sampling settings")
    refused(frame_of(*values[:5], 7), "of type int; allowed: bytes")


def test_later_sampling_settings_take_no_byte_where_they_are_not_used() -> None:
    plain = CODEC.encode(Open(1, 0, Mode.IDS, SAMPLING, (1, 2)))
    assert msgpack.unpackb(plain)[4] == struct.pack("<dIdQ", 0.5, 3, 0.9, 7)
    penalized = CODEC.encode(Open(1, 0, Mode.IDS, replace(SAMPLING, presence_penalty=1.0), (1, 2)))
    assert msgpack.unpackb(penalized)[4] == [struct.pack("<dIdQ", 0.5, 3, 0.9, 7), 0.0, 1.0, 1.0]
    assert msgpack.unpackb(CODEC.encode(Open(1, 0, Mode.IDS, SAMPLING, (1, 2), 1)))[-1] == 1


def test_the_vocabulary_follows_the_fields_of_a_welcome_that_an_older_device_knows() -> None:
    older = Welcome(3, "table", 4096, 64, (Mode.IDS,), (Encoding.SPARSE,), 4096, 512, 4, 100, 4)
    newer = replace(older, vocab_size=70_000, stop_ids=(2, 69_999))
    values = msgpack.unpackb(CODEC.encode(newer))
    assert values[:12] == msgpack.unpackb(CODEC.encode(older))
    assert values[12:] == [70_000, [2, 69_999]]
    assert CODEC.decode(frame_of(*values)) == newer
    assert CODEC.decode(frame_of(*values[:12])) == older


def test_the_pace_follows_the_fields_of_a_welcome_that_an_older_device_knows() -> None:
    older = Welcome(4, "table", 4096, 64, (Mode.IDS,), vocab_size=300, stop_ids=(2,))
    newer = replace(older, pass_seconds=0.02, row_seconds=0.001)
    values = msgpack.unpackb(CODEC.encode(newer))
    assert values[:14] == msgpack.unpackb(CODEC.encode(older))
    assert values[14:] == [0.02, 0.001]
    assert CODEC.decode(frame_of(*values)) == newer
    assert CODEC.decode(frame_of(*values[:14])) == older
    for wrong in (-1e-9, float("nan"), float("inf"), 4294967296.0):
        refused(frame_of(*values[:14], wrong), "a time is .*; allowed: 0 to 4294967295 seconds")
    refused(frame_of(*values[:14], 1), "of type int; allowed: float")


@pytest.mark.parametrize(
    "older",
    [
        Welcome(5, "table", 4096, 64, (Mode.TOPK,), vocab_size=300, max_grammar_len=9),
        Open(1, 0, Mode.TOPK, SAMPLING, (1, 2), 1),
    ],
)
def test_block_verification_follows_the_fields_that_an_older_peer_knows(older: Welcome | Open) -> None:
    newer = replace(older, block_verification=True)
    values = msgpack.unpackb(CODEC.encode(newer))
    assert values == [*msgpack.unpackb(CODEC.encode(older)), True]
    assert CODEC.decode(frame_of(*values)) == newer
    refused(frame_of(*values[:-1], 1), "of type int; allowed: bool")
