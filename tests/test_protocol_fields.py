"""Fields of frames: what each may hold; anything else raises FrameError or LimitError with what is allowed."""

import struct

import msgpack
import numpy as np
import pytest

from protocol.draft_codec import encode_drafted
from protocol.errors import LimitError
from protocol.frames import FrameCodec
from protocol.full_distribution import FullDistribution
from protocol.messages import Draft, Fault, Open
from protocol.sparse import SparseDistribution
from tests.test_protocol_frames import CODEC, frame_of, ids_of, refused


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (frame_of(8, True), "of type bool; allowed: int"),
        (frame_of(8, 1.0), "of type float; allowed: int"),
        (frame_of(8, "1"), "of type str; allowed: int"),
        (frame_of(8, None), "of type NoneType; allowed: int"),
        (frame_of(8, [1]), "of type list; allowed: int"),
        (frame_of(8, -1), "-1; allowed: 0 to 4294967295"),
        (frame_of(8, 2**32), "4294967296; allowed: 0 to 4294967295"),
        (frame_of(7, 0, 1, 0, 300), "300; allowed: 0 to 299"),
        (frame_of(7, 0, 1, 0, True), "of type bool; allowed: int"),
        (frame_of(5, 0, 1, ids_of(300)), "token id 300; allowed: 0 to 299"),
        (frame_of(5, 0, 1, ids_of(5, 511)), "token id 511; allowed: 0 to 299"),
        (frame_of(5, 0, 1, b"\x01"), "more bits than expected"),
        (frame_of(5, 0, 1, b"\x00"), "more bits than expected"),
        (frame_of(5, 0, 1, ids_of(1)[:-1] + b"\x01"), "more bits than expected"),
        (frame_of(5, 0, 1, [1, 2]), "of type list; allowed: bytes"),
        (frame_of(5, 0, 1, "ab"), "of type str; allowed: bytes"),
        (frame_of(0, 1, 300, bytes(31), []), "31 bytes; allowed: 32"),
        (frame_of(0, 1, 300, bytes(32), [-1]), "-1; allowed: 0 to"),
        (frame_of(0, 1, 300, bytes(32), [[1]]), "of type list; allowed: int"),
        (frame_of(0, 1, 300, bytes(32), 2), "of type int; allowed: list"),
        (frame_of(1, 1, "x" * 201, 1, 1, []), "201 characters; allowed: 200"),
        (frame_of(1, 1, b"x", 1, 1, []), "of type bytes; allowed: str"),
        (frame_of(1, 1, "x", 1, 1, [99]), "99; allowed: 0 to"),
        (frame_of(9, None, "x" * 41, ""), "41 characters; allowed: 40"),
        (frame_of(9, None, "", "x" * 1001), "1001 characters; allowed: 1000"),
        (frame_of(9, False, "", ""), "of type bool; allowed: int"),
    ],
)
def test_an_invalid_field_is_refused_with_the_allowed_values(frame: bytes, match: str) -> None:
    refused(frame, match)


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (
            frame_of(2, 0, 0, 1, struct.pack("<dIdQ", 0, 0, 1, 0), ids_of(*[1] * 5)),
            "5 exceeds .*--max-prompt-len of 4",
        ),
        (frame_of(4, 0, 1, 0, ids_of(1, 2, 3, 4, 5)), "5 exceeds the base station's --max-prompt-len of 4"),
        (frame_of(5, 0, 1, ids_of(1, 2, 3, 4)), "4 exceeds the base station's --max-draft-len of 3"),
        (frame_of(10, 0, 1, 7, ids_of(1, 2, 3, 4)), "4 exceeds the base station's --max-draft-len of 3"),
        (frame_of(5, 0, 1, 4, 4, 10, b""), "4 exceeds the base station's --max-draft-len of 3"),
        (frame_of(5, 0, 1, 1, 6, 10, b""), "6 exceeds the base station's --max-uplink-k of 5"),
        (frame_of(5, 0, 1, 3, 2**64 - 1, 10, b""), "--max-uplink-k of 5"),
    ],
)
def test_a_request_beyond_a_limit_is_refused_by_the_limits_name(frame: bytes, match: str) -> None:
    refused(frame, match, LimitError)


def test_each_distribution_of_a_draft_is_checked_against_the_limit() -> None:
    small = SparseDistribution.quantize(300, np.array([7]), np.ones(1), 12)
    large = SparseDistribution.quantize(300, np.arange(6), np.full(6, 1 / 6), 12)
    refused(FrameCodec(300).encode(Draft(0, 1, (7, 5), (small, large))), "6 exceeds .*--max-uplink-k", LimitError)


@pytest.mark.parametrize(
    "values",
    [
        (101.0, 0, 1.0, 0),
        (-1.0, 0, 1.0, 0),
        (np.nan, 0, 1.0, 0),
        (1.0, 2**31, 1.0, 0),
        (1.0, 0, 0.0, 0),
        (1.0, 0, 1.1, 0),
        (1.0, 0, np.nan, 0),
        (1.0, 0, 1.0, 2**63),
    ],
)
def test_sampling_settings_out_of_range_are_refused(values: tuple[float, int, float, int]) -> None:
    packed = np.array([values], "<f8,<u4,<f8,<u8").tobytes()
    assert isinstance(
        CODEC.decode(frame_of(2, 0, 0, 1, np.array([(1, 0, 1, 0)], "<f8,<u4,<f8,<u8").tobytes(), b"")), Open
    )
    refused(frame_of(2, 0, 0, 1, packed, b""), "sampling settings: .*; allowed: ")
    refused(frame_of(2, 0, 0, 1, packed[:-1], b""), "sampling settings")
    refused(frame_of(2, 0, 0, 1, list(values), b""), "of type float; allowed: bytes")


ONE = encode_drafted((7,), (SparseDistribution.quantize(300, np.array([7, 200]), np.array([0.5, 0.5]), 10),))
FP16 = FullDistribution.quantize(np.eye(300)[7]).encode()


@pytest.mark.parametrize(
    ("drafted", "match"),
    [
        ([1, 2, 10, ONE.data, 0], "Draft has 5 fields of drafted tokens; allowed: 0, 1, 2 or 4"),
        ([1, 2, 10], "Draft has 3 fields of drafted tokens; allowed: 0, 1, 2 or 4"),
        ([True, 2, 10, ONE.data], "of type bool; allowed: int"),
        ([1, 2.0, 10, ONE.data], "of type float; allowed: int"),
        ([1, 2, 10, list(ONE.data)], "of type list; allowed: bytes"),
        ([0, 1, 10, ONE.data], "0 drafted tokens; allowed: 1 or more"),
        ([-1, 1, 10, ONE.data], "-1 drafted tokens; allowed: 1 or more"),
        ([1, 0, 10, ONE.data], "0 entries of distributions; allowed: 1 to 10"),
        ([1, 2, 2**64 - 1, ONE.data], "steps of 1/18446744073709551615"),
        ([ids_of(7), FP16 + FP16], "1200 bytes of probabilities for 1 drafted tokens; allowed: 600 for each"),
        ([ids_of(7), b""], "0 bytes of probabilities for 1 drafted tokens"),
        ([ids_of(7), [FP16]], "of type list; allowed: bytes"),
        ([ids_of(6), FP16], "token 6 has probability 0"),
        ([ids_of(7, 299), FP16 + FP16], "token 299 has probability 0"),
    ],
)
def test_inconsistent_drafted_tokens_are_refused(drafted: list[object], match: str) -> None:
    assert isinstance(CODEC.decode(frame_of(5, 0, 1, 1, 2, 10, ONE.data)), Draft)
    assert isinstance(CODEC.decode(frame_of(5, 0, 1, ids_of(7), FP16)), Draft)
    refused(frame_of(5, 0, 1, *drafted), match)


def test_a_long_fault_text_is_truncated() -> None:
    fault = CODEC.decode(CODEC.encode(Fault(1, "state", "é" * 5000)))
    assert fault == Fault(1, "state", "é" * 1000)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [b""],
        [None],
        [float("nan")],
        [0.0, 1.0, 0.0, 0.0, b"1234567"],
        [0.0, 1.0, 0.0, 0.0, struct.pack("<If", 300, 1.0)],
        [0.0, 1.0, 0.0, 0.0, struct.pack("<If", 1, np.nan)],
        [0.0, 1.0, 0.0, 0.0, struct.pack("<If", 1, 1.0) * 2],
        [0.0, 1.0, 0.0, 0.0, bytes(8 * 1025)],
        [0.0, 1.0, 0.0, 0.0, b"", 2**31],
        [0.0, 1.0, 0.0, 0.0, b"", 0, 1],
        [0.0, 1.0, 0.0, 0.0, b"", 0, True, [300]],
        [0.0, 1.0, 0.0, 0.0, b"", 0, True, [1] * 65],
        [0.0, 1.0, 0.0, 0.0, b"", 0, False, [], b"{}"],
        [0.0, 1.0, 0.0, 0.0, b"", 5, False, [], "{}"],
    ],
    ids=lambda values: str(values)[:60],
)
def test_invalid_later_sampling_settings_are_refused(values: list[object]) -> None:
    first = [] if values == [] else [struct.pack("<dIdQ", 0.5, 3, 0.9, 7)]
    refused(frame_of(2, 1, 0, 0, [*first, *values], ids_of(1, 2)), "sampling settings|field|biases?|token id|allowed")


@pytest.mark.parametrize(
    "told",
    [
        b"",
        b"123",
        b"12345678",
        struct.pack("<f", np.nan),
        struct.pack("<fIf", -1.0, 300, -1.0),
        struct.pack("<fIf", -1.0, 2, np.nan),
        bytes(4 + 8 * 21),
        "text",
    ],
    ids=str,
)
def test_invalid_log_probabilities_are_refused(told: object) -> None:
    refused(frame_of(7, 0, 1, 0, 5, [told]), "log-probabilit|of type str; allowed: bytes")


def test_a_given_draft_has_tokens_and_nothing_else() -> None:
    assert msgpack.unpackb(CODEC.encode(Draft(1, 2, (5,), given=True))) == [13, 1, 2, ids_of(5)]
    refused(frame_of(13, 1, 2), "given tokens has 2 fields; allowed: 3")
