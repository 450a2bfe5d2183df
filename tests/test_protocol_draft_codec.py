"""The tokens of a round with their distributions: few bytes, one meaning, and rubbish is refused."""

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
def test_what_was_drawn_arrives_as_it_was_sent(vocab_size: int, steps: int) -> None:
    @given(drawn(vocab_size, steps))
    @settings(relaxed, max_examples=40)
    def arrives(case: DraftedTokens) -> None:
        packed = encode_drafted(*case)
        assert decode_drafted(packed, vocab_size) == case
        assert encode_drafted(*decode_drafted(packed, vocab_size)) == packed

    arrives()


def test_bytes_once_written_keep_their_meaning() -> None:
    probs = np.array([0.5, 0.3, 0.15, 0.05])
    distributions = (
        SparseDistribution.quantize(49_152, np.array([40_000, 7, 1234, 9]), probs, 768),
        SparseDistribution.quantize(49_152, np.array([49_151, 0]), np.array([0.9, 0.1]), 768),
    )
    packed = EncodedDraft(2, 6, 768, bytes.fromhex("e53c004800964011c0007fff64a730fed240"))
    assert encode_drafted((1234, 0), distributions) == packed
    token_ids, (first, second) = decode_drafted(packed, 49_152)
    assert token_ids == (1234, 0)
    assert (first.support.tolist(), first.weights.tolist()) == ([7, 9, 1234, 40_000], [230, 39, 115, 384])
    assert (second.support.tolist(), second.weights.tolist()) == ([0, 49_151], [77, 691])


@pytest.mark.parametrize("support", [range(32), range(49_152 - 32, 49_152), range(0, 49_152, 1536)])
@pytest.mark.parametrize("round_id", [1, 60_000])
def test_32_of_49152_tokens_take_at_most_80_bytes_at_the_socket(support: range, round_id: int) -> None:
    codec, one = FrameCodec(49_152), even(49_152, list(support), 768)
    frame = codec.encode(Draft(0, round_id, (support[3],) * 8, (one,) * 8))
    assert socket_bytes(frame) <= 8 * 80


def test_a_peaked_distribution_takes_less() -> None:
    weights = np.exp2(-np.arange(32.0))
    one = SparseDistribution.quantize(49_152, np.arange(32) * 1536, weights, 768)
    assert 8 <= len(one) <= 12
    assert len(encode_drafted((0,) * 8, (one,) * 8).data) <= 8 * 32


@given(st.data())
@settings(relaxed, max_examples=500)
def test_any_bytes_are_a_draft_or_a_frame_error(data: st.DataObject) -> None:
    vocab_size, steps = data.draw(st.integers(2, 300)), data.draw(st.integers(1, 300))
    sizes = st.integers(-1, 30) | st.just(2**62)
    packed = data.draw(st.builds(EncodedDraft, sizes, sizes, st.just(steps) | sizes, st.binary(max_size=60)))
    unpacks_or_raises_frame_error(packed, vocab_size)


def unpacks_or_raises_frame_error(packed: EncodedDraft, vocab_size: int) -> None:
    try:
        token_ids, distributions = decode_drafted(packed, vocab_size)
    except FrameError:
        return
    assert len(token_ids) == len(distributions) == packed.draft_len
    for token_id, one in zip(token_ids, distributions, strict=True):
        assert one.probability(token_id) > 0
        assert one.support.tolist() == sorted(set(one.support.tolist()))
        assert 0 <= one.support[0] <= one.support[-1] < vocab_size
        assert (one.weights >= 1).all()
        assert one.weights.sum() == one.total == packed.steps
    assert encode_drafted(token_ids, distributions) == packed


@pytest.mark.parametrize("steps", [1, 3, 200])
def test_a_damaged_draft_is_another_one_or_a_frame_error(steps: int) -> None:
    @given(drawn(60, steps), st.data())
    @settings(relaxed, max_examples=200)
    def damaged(case: DraftedTokens, data: st.DataObject) -> None:
        packed = encode_drafted(*case)
        frame = bytearray(packed.data)
        for _ in range(data.draw(st.integers(1, 3))):
            frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        unpacks_or_raises_frame_error(replace(packed, data=bytes(frame)), 60)

    damaged()


HONEST = encode_drafted((7, 200), (even(300, [7, 9, 200], 10), even(300, [100, 200], 10)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"draft_len": 0}, "0 drafted tokens; allowed: 1 and more"),
        ({"steps": 0}, "steps of 1/0; allowed: 1 to 16777216"),
        ({"steps": 2**24 + 1}, "steps of 1/16777217; allowed: 1 to 16777216"),
        ({"entries": 1}, "1 entries of distributions; allowed: 2 to 20"),
        ({"entries": 21}, "21 entries of distributions; allowed: 2 to 20"),
        ({"entries": 2**63}, "entries of distributions; allowed: 2 to 20"),
        ({"data": HONEST.data[:-1]}, "bits; the message says"),
        ({"data": b""}, "a field has 0 bits"),
        ({"data": HONEST.data + b"\x00"}, "more bits than the message says"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Any], match: str) -> None:
    assert len(decode_drafted(HONEST, 300)[0]) == 2
    with pytest.raises(FrameError, match=match):
        decode_drafted(replace(HONEST, **change), 300)
