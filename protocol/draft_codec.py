"""The drafted tokens of a round and the distributions they were drawn from, as one run of bits.

For n tokens of V, in distributions that count in steps of 1/N:

1. the supports, as one set (``bits.py``): id + i·V for the i-th token, below n·V;
2. the weights, as one set: where each support's cumulative weights end, but for
   the last, which is N: cumulative weight − 1 + i·(N − 1), below n·(N − 1);
3. each drafted token, as its place among the ids of its support, in ⌈log2 K⌉ bits, K
   being the largest support's size.

n, N and the number of all entries go before. Each count of entries is then
implied, and all arithmetic is of integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from protocol.bits import BitReader, Numbers, number_bits, pack, set_bits
from protocol.errors import FrameError
from protocol.sparse import MAX_STEPS, SparseDistribution

DraftedTokens: TypeAlias = tuple[tuple[int, ...], tuple[SparseDistribution, ...]]
"""Token ids, and the distribution each was drawn from."""


@dataclass(frozen=True)
class EncodedDraft:
    """``draft_len`` tokens and the ``entries`` of all their distributions, in steps of 1/``steps``."""

    draft_len: int
    entries: int
    steps: int
    data: bytes


def encode_drafted(token_ids: Sequence[int], distributions: Sequence[SparseDistribution]) -> EncodedDraft:
    """The layout above; every distribution has the same vocabulary and steps."""
    draft_len, vocab_size, steps = len(token_ids), distributions[0].vocab_size, distributions[0].total
    assert all((one.vocab_size, one.total) == (vocab_size, steps) for one in distributions)
    counts = [len(one) for one in distributions]
    owners = np.repeat(np.arange(draft_len), counts)
    entries = np.concatenate([one.support for one in distributions]) + owners * vocab_size
    cumulative = np.concatenate([one.weights for one in distributions]).cumsum()
    inner = cumulative % steps != 0
    places = [int(one.support.searchsorted(token_id)) for token_id, one in zip(token_ids, distributions, strict=True)]
    assert (entries[owners.searchsorted(range(draft_len)) + places] % vocab_size == token_ids).all()
    sections = [
        set_bits(entries, draft_len * vocab_size),
        set_bits((cumulative - 1 - owners)[inner], draft_len * (steps - 1)),
        number_bits(places, _place_width(counts)),
    ]
    return EncodedDraft(draft_len, len(entries), steps, pack(sections))


def decode_drafted(packed: EncodedDraft, vocab_size: int) -> DraftedTokens:
    """The drafted tokens and their distributions.

    Raises:
        FrameError: the numbers or the bits are not those of a draft.
    """
    _check_sizes(packed, vocab_size)
    reader = BitReader(packed.data)
    entries = reader.members(packed.entries, packed.draft_len * vocab_size)
    owners = entries // vocab_size
    counts = np.bincount(owners, minlength=packed.draft_len)
    weights = _read_weights(reader, counts, packed.steps)
    places = reader.numbers(packed.draft_len, _place_width(counts))
    reader.finish()
    if (places >= counts).any():
        raise FrameError("a drafted token is no entry of its distribution")
    support, ends = entries - owners * vocab_size, counts.cumsum()
    distributions = tuple(
        SparseDistribution(vocab_size, support[start:end], weights[start:end], packed.steps)
        for start, end in pairwise([0, *ends.tolist()])
    )
    return tuple(support[ends - counts + places].tolist()), distributions


def _check_sizes(packed: EncodedDraft, vocab_size: int) -> None:
    if packed.draft_len < 1:
        raise FrameError(f"{packed.draft_len} drafted tokens; allowed: 1 and more")
    if not 1 <= packed.steps <= MAX_STEPS:
        raise FrameError(f"probabilities in steps of 1/{packed.steps}; allowed: 1 to {MAX_STEPS}")
    most = packed.draft_len * min(vocab_size, packed.steps)
    if not packed.draft_len <= packed.entries <= most:
        raise FrameError(f"{packed.entries} entries of distributions; allowed: {packed.draft_len} to {most}")


def _read_weights(reader: BitReader, counts: Numbers, steps: int) -> Numbers:
    """The weights of all entries, int64; the ``counts`` entries of each distribution sum to ``steps``."""
    draft_len, entries = len(counts), int(counts.sum())
    ends = reader.members(entries - draft_len, draft_len * (steps - 1))
    owners = ends // max(1, steps - 1)
    if (np.bincount(owners, minlength=draft_len) != counts - 1).any():
        raise FrameError("the weights of a distribution are not as many as its tokens")
    last = np.zeros(entries, bool)
    last[counts.cumsum() - 1] = True
    cumulative = np.empty(entries, np.int64)
    cumulative[last] = np.arange(1, draft_len + 1) * steps
    cumulative[~last] = ends + owners + 1
    cumulative[1:] -= cumulative[:-1].copy()
    return cumulative


def _place_width(counts: Sequence[int] | Numbers) -> int:
    return int(max(counts) - 1).bit_length()
