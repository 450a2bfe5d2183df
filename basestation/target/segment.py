"""One sequence's part of a forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

from basestation.kv_cache.kv_pool import SequenceKVCache


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens of one sequence in a forward pass.

    Attributes:
        kv_cache: of the sequence; the pass appends to it.
        token_ids: to run.
        num_logits: how many of the last tokens return their logits.
    """

    kv_cache: SequenceKVCache
    token_ids: Sequence[int]
    num_logits: int
