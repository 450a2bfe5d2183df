"""Encoding ``sparse``: the drafted tokens of a round and their distributions as one bit string.

For n tokens of a vocabulary of V, with probabilities in steps of 1/N:

1. the supports, as one set (``bits.py``): id + i·V for the i-th distribution, below n·V;
2. the weights, as one set: each cumulative weight of a distribution except the last,
   which is N, as cumulative weight − 1 + i·(N − 1), below n·(N − 1);
3. each drafted token, as its index in its support, in ⌈log2 K⌉ bits, where K is the
   size of the largest support.

n, N and the total number of entries precede the bits. They imply the size of each
support, and all arithmetic is on integers.
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
"""Token ids, and the distribution that each was drawn from."""


@dataclass(frozen=True)
class EncodedDraft:
    """``draft_len`` tokens and ``entries`` entries of their distributions in total, in steps of 1/``steps``."""

    draft_len: int
    entries: int
    steps: int
    data: bytes


def encode_drafted(token_ids: Sequence[int], distributions: Sequence[SparseDistribution]) -> EncodedDraft:
    """Encode tokens and distributions; every distribution has the same vocabulary size and steps."""
    draft_len, vocab_size, steps = len(token_ids), distributions[0].vocab_size, distributions[0].total
    assert all((one.vocab_size, one.total) == (vocab_size, steps) for one in distributions)
    counts = [len(one) for one in distributions]
    owners = np.repeat(np.arange(draft_len), counts)
    entries = np.concatenate([one.support for one in distributions]) + owners * vocab_size
    cumulative = np.concatenate([one.weights for one in distributions]).cumsum()
    inner = cumulative % steps != 0
    indices = [int(one.support.searchsorted(token_id)) for token_id, one in zip(token_ids, distributions, strict=True)]
    assert (entries[owners.searchsorted(range(draft_len)) + indices] % vocab_size == token_ids).all()
    sections = [
        set_bits(entries, draft_len * vocab_size),
        set_bits((cumulative - 1 - owners)[inner], draft_len * (steps - 1)),
        number_bits(indices, _index_width(counts)),
    ]
    return EncodedDraft(draft_len, len(entries), steps, pack(sections))


def decode_drafted(encoded: EncodedDraft, vocab_size: int) -> DraftedTokens:
    """Decode the drafted tokens and their distributions.

    Raises:
        FrameError: the sizes or the bits are invalid.
    """
    _check_sizes(encoded, vocab_size)
    reader = BitReader(encoded.data)
    entries = reader.members(encoded.entries, encoded.draft_len * vocab_size)
    owners = entries // vocab_size
    counts = np.bincount(owners, minlength=encoded.draft_len)
    weights = _read_weights(reader, counts, encoded.steps)
    indices = reader.numbers(encoded.draft_len, _index_width(counts))
    reader.finish()
    if (indices >= counts).any():
        raise FrameError("a drafted token is not an entry of its distribution")
    support, ends = entries - owners * vocab_size, counts.cumsum()
    distributions = tuple(
        SparseDistribution(vocab_size, support[start:end], weights[start:end], encoded.steps)
        for start, end in pairwise([0, *ends.tolist()])
    )
    return tuple(support[ends - counts + indices].tolist()), distributions


def _check_sizes(encoded: EncodedDraft, vocab_size: int) -> None:
    if encoded.draft_len < 1:
        raise FrameError(f"{encoded.draft_len} drafted tokens; allowed: 1 or more")
    if not 1 <= encoded.steps <= MAX_STEPS:
        raise FrameError(f"probabilities in steps of 1/{encoded.steps}; allowed: 1 to {MAX_STEPS}")
    most = encoded.draft_len * min(vocab_size, encoded.steps)
    if not encoded.draft_len <= encoded.entries <= most:
        raise FrameError(f"{encoded.entries} entries of distributions; allowed: {encoded.draft_len} to {most}")


def _read_weights(reader: BitReader, counts: Numbers, steps: int) -> Numbers:
    """The weights of all entries, int64; the ``counts`` entries of each distribution sum to ``steps``."""
    draft_len, entries = len(counts), int(counts.sum())
    ends = reader.members(entries - draft_len, draft_len * (steps - 1))
    owners = ends // max(1, steps - 1)
    if (np.bincount(owners, minlength=draft_len) != counts - 1).any():
        raise FrameError("a distribution has another number of weights than of entries")
    last = np.zeros(entries, bool)
    last[counts.cumsum() - 1] = True
    cumulative = np.empty(entries, np.int64)
    cumulative[last] = np.arange(1, draft_len + 1) * steps
    cumulative[~last] = ends + owners + 1
    cumulative[1:] -= cumulative[:-1].copy()
    return cumulative


def _index_width(counts: Sequence[int] | Numbers) -> int:
    return int(max(counts) - 1).bit_length()
