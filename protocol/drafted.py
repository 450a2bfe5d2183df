"""The drafted tokens of a round and the distributions they were drawn from, as one run of bits.

For n tokens of V, in distributions that count in steps of 1/N:

1. the supports, as one set (``bits.py``): id + i·V for the i-th token, below n·V;
2. the weights, as one set: where each support's cumulative weights end, but for
   the last, which is N: cumulative weight − 1 + i·(N − 1), below n·(N − 1);
3. each drafted token, as its place among the K ids of its support, in ⌈log2 K⌉ bits.

n, N and the number of all entries go before. Each count of entries is then
implied, and all arithmetic is of integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from protocol.bits import BitReader, number_bits, pack, set_bits
from protocol.errors import FrameError
from protocol.sparse import MAX_STEPS, SparseDistribution

Drawn: TypeAlias = tuple[tuple[int, ...], tuple[SparseDistribution, ...]]
"""Token ids, and the distribution each was drawn from."""


@dataclass(frozen=True)
class PackedDraft:
    """``draft_len`` tokens and the ``entries`` of all their distributions, in steps of 1/``steps``."""

    draft_len: int
    entries: int
    steps: int
    data: bytes


def pack_drawn(token_ids: Sequence[int], distributions: Sequence[SparseDistribution]) -> PackedDraft:
    """The layout above; every distribution has the same vocabulary and steps."""
    draft_len, vocab_size, steps = len(token_ids), distributions[0].vocab_size, distributions[0].total
    assert all(one.total == steps for one in distributions)
    entries = np.concatenate([one.support + i * vocab_size for i, one in enumerate(distributions)])
    weight_ends = [one.weights.cumsum()[:-1] - 1 + i * (steps - 1) for i, one in enumerate(distributions)]
    places = [
        number_bits([_place(token_id, one)], _place_width(len(one)))
        for token_id, one in zip(token_ids, distributions, strict=True)
    ]
    sections = [
        set_bits(entries, draft_len * vocab_size),
        set_bits(np.concatenate(weight_ends), draft_len * (steps - 1)),
        *places,
    ]
    return PackedDraft(draft_len, len(entries), steps, pack(sections))


def unpack_drawn(packed: PackedDraft, vocab_size: int, max_draft_len: int) -> Drawn:
    """The drafted tokens and their distributions.

    Raises:
        FrameError: the numbers or the bits are not those of a draft.
    """
    _check_sizes(packed, vocab_size, max_draft_len)
    reader = BitReader(packed.data)
    entries = reader.members(packed.entries, packed.draft_len * vocab_size)
    counts = np.bincount(entries // vocab_size, minlength=packed.draft_len)
    weights = _read_weights(reader, counts, packed.steps)
    ends = counts.cumsum().tolist()
    distributions = tuple(
        SparseDistribution(vocab_size, entries[start:end] - i * vocab_size, weights[start:end], packed.steps)
        for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    )
    token_ids = tuple(_read_token(reader, one) for one in distributions)
    reader.finish()
    return token_ids, distributions


def _check_sizes(packed: PackedDraft, vocab_size: int, max_draft_len: int) -> None:
    if not 1 <= packed.draft_len <= max_draft_len:
        raise FrameError(f"{packed.draft_len} drafted tokens; allowed: 1 to {max_draft_len}")
    if not 1 <= packed.steps <= MAX_STEPS:
        raise FrameError(f"probabilities in steps of 1/{packed.steps}; allowed: 1 to {MAX_STEPS}")
    most = packed.draft_len * min(vocab_size, packed.steps)
    if not packed.draft_len <= packed.entries <= most:
        raise FrameError(f"{packed.entries} entries of distributions; allowed: {packed.draft_len} to {most}")


def _read_weights(reader: BitReader, counts: npt.NDArray[np.int64], steps: int) -> npt.NDArray[np.int64]:
    """The weights of all entries, int64; ``counts`` entries of each distribution sum to ``steps``."""
    draft_len, entries = len(counts), int(counts.sum())
    inner = reader.members(entries - draft_len, draft_len * (steps - 1))
    owners = inner // max(1, steps - 1)
    if (np.bincount(owners, minlength=draft_len) != counts - 1).any():
        raise FrameError("the weights of a distribution are not as many as its tokens")
    last = np.zeros(entries, bool)
    last[counts.cumsum() - 1] = True
    cumulative = np.empty(entries, np.int64)
    cumulative[last] = np.arange(1, draft_len + 1) * steps
    cumulative[~last] = inner + owners + 1
    return np.diff(cumulative, prepend=0)


def _place_width(count: int) -> int:
    return (count - 1).bit_length()


def _place(token_id: int, distribution: SparseDistribution) -> int:
    place = int(np.searchsorted(distribution.support, token_id))
    assert distribution.probability(token_id) > 0
    return place


def _read_token(reader: BitReader, distribution: SparseDistribution) -> int:
    place = int(reader.numbers(1, _place_width(len(distribution)))[0])
    if place >= len(distribution):
        raise FrameError(f"a drafted token is entry {place} of its distribution; allowed: 0 to {len(distribution) - 1}")
    return int(distribution.support[place])
