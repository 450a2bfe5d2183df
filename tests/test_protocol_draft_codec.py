"""Encoding ``sparse``: round trips, few bytes, one encoding per draft, and refusal of invalid bytes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.draft_codec import DraftedTokens, EncodedDraft, decode_drafted, encode_drafted
from protocol.errors import FrameError
from protocol.frames import FrameCodec
from protocol.messages import Draft
from protocol.sparse import MAX_STEPS, SparseDistribution
from protocol.zmtp import socket_bytes

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LIMIT = 8


def even(vocab_size: int, support: list[int], steps: int) -> SparseDistribution:
    return SparseDistribution.quantize(vocab_size, np.array(support), np.full(len(support), 1 / len(support)), steps)


@st.composite
def drawn(draw: st.DrawFn, vocab_size: int, steps: int) -> DraftedTokens:
    token_ids, distributions = [], []
    for _ in range(draw(st.integers(1, LIMIT))):
        support = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=40, unique=True))
        weights = draw(st.lists(st.integers(1, 9999), min_size=len(support), max_size=len(support)))
        probs = np.array(weights) / sum(weights)
        distributions.append(SparseDistribution.quantize(vocab_size, np.array(support), probs, steps))
        token_ids.append(draw(st.sampled_from(distributions[-1].support.tolist())))
    return tuple(token_ids), tuple(distributions)


@pytest.mark.parametrize("vocab_size", [2, 300, 49_152, 200_000])
@pytest.mark.parametrize("steps", [1, 2, 7, 768, MAX_STEPS])
def test_drafts_round_trip(vocab_size: int, steps: int) -> None:
    @given(drawn(vocab_size, steps))
    @settings(relaxed, max_examples=40)
    def round_trips(case: DraftedTokens) -> None:
        encoded = encode_drafted(*case)
        assert decode_drafted(encoded, vocab_size) == case
        assert encode_drafted(*decode_drafted(encoded, vocab_size)) == encoded

    round_trips()


def test_known_bytes_keep_their_meaning() -> None:
    probs = np.array([0.5, 0.3, 0.15, 0.05])
    distributions = (
        SparseDistribution.quantize(49_152, np.array([40_000, 7, 1234, 9]), probs, 768),
        SparseDistribution.quantize(49_152, np.array([49_151, 0]), np.array([0.9, 0.1]), 768),
    )
    encoded = EncodedDraft(2, 6, 768, bytes.fromhex("e53c004800964011c0007fff64a730fed240"))
    assert encode_drafted((1234, 0), distributions) == encoded
    token_ids, (first, second) = decode_drafted(encoded, 49_152)
    assert token_ids == (1234, 0)
    assert (first.support.tolist(), first.weights.tolist()) == ([7, 9, 1234, 40_000], [230, 39, 115, 384])
    assert (second.support.tolist(), second.weights.tolist()) == ([0, 49_151], [77, 691])


@pytest.mark.parametrize("support", [range(32), range(49_152 - 32, 49_152), range(0, 49_152, 1536)])
@pytest.mark.parametrize("round_id", [1, 60_000])
def test_32_of_49152_tokens_take_at_most_80_bytes_at_the_socket(support: range, round_id: int) -> None:
    codec, one = FrameCodec(49_152), even(49_152, list(support), 768)
    frame = codec.encode(Draft(0, round_id, (support[3],) * 8, (one,) * 8))
    assert socket_bytes(frame) <= 8 * 80


def test_a_peaked_distribution_takes_fewer_bytes() -> None:
    weights = np.exp2(-np.arange(32.0))
    one = SparseDistribution.quantize(49_152, np.arange(32) * 1536, weights, 768)
    assert 8 <= len(one) <= 12
    assert len(encode_drafted((0,) * 8, (one,) * 8).data) <= 8 * 32


@given(st.data())
@settings(relaxed, max_examples=500)
def test_random_bytes_decode_or_raise_frame_error(data: st.DataObject) -> None:
    vocab_size, steps = data.draw(st.integers(2, 300)), data.draw(st.integers(1, 300))
    sizes = st.integers(-1, 30) | st.just(2**62)
    encoded = data.draw(st.builds(EncodedDraft, sizes, sizes, st.just(steps) | sizes, st.binary(max_size=60)))
    decodes_or_raises_frame_error(encoded, vocab_size)


def decodes_or_raises_frame_error(encoded: EncodedDraft, vocab_size: int) -> None:
    try:
        token_ids, distributions = decode_drafted(encoded, vocab_size)
    except FrameError:
        return
    assert len(token_ids) == len(distributions) == encoded.draft_len
    for token_id, one in zip(token_ids, distributions, strict=True):
        assert token_id in one.support
        assert one.support.tolist() == sorted(set(one.support.tolist()))
        assert 0 <= one.support[0] <= one.support[-1] < vocab_size
        assert (one.weights >= 1).all()
        assert one.weights.sum() == one.total == encoded.steps
    assert encode_drafted(token_ids, distributions) == encoded


@pytest.mark.parametrize("steps", [1, 3, 200])
def test_damaged_drafts_decode_or_raise_frame_error(steps: int) -> None:
    @given(drawn(60, steps), st.data())
    @settings(relaxed, max_examples=200)
    def damaged(case: DraftedTokens, data: st.DataObject) -> None:
        encoded = encode_drafted(*case)
        frame = bytearray(encoded.data)
        for _ in range(data.draw(st.integers(1, 3))):
            frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        decodes_or_raises_frame_error(replace(encoded, data=bytes(frame)), 60)

    damaged()


VALID = encode_drafted((7, 200), (even(300, [7, 9, 200], 10), even(300, [100, 200], 10)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"draft_len": 0}, "0 drafted tokens; allowed: 1 or more"),
        ({"steps": 0}, "steps of 1/0; allowed: 1 to 16777216"),
        ({"steps": 2**24 + 1}, "steps of 1/16777217; allowed: 1 to 16777216"),
        ({"entries": 1}, "1 entries of distributions; allowed: 2 to 20"),
        ({"entries": 21}, "21 entries of distributions; allowed: 2 to 20"),
        ({"entries": 2**63}, "entries of distributions; allowed: 2 to 20"),
        ({"data": VALID.data[:-1]}, "bits; expected"),
        ({"data": b""}, "a field has 0 bits"),
        ({"data": VALID.data + b"\x00"}, "more bits than expected"),
    ],
    ids=str,
)
def test_inconsistent_sizes_are_refused(change: dict[str, Any], match: str) -> None:
    assert len(decode_drafted(VALID, 300)[0]) == 2
    with pytest.raises(FrameError, match=match):
        decode_drafted(replace(VALID, **change), 300)
