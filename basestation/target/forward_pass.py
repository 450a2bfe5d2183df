"""What one forward pass runs, as plain numbers: tokens, positions, page tables and the rows whose logits count."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from basestation.target.segment import Segment


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """The tokens of several sequences in one row.

    Attributes:
        token_ids: T tokens, those of one sequence after those of another.
        positions: of each token in its sequence.
        logit_rows: which of the T tokens return their logits.
        starts: for each sequence, the positions that its pages hold already.
        counts: for each sequence, how many of the T tokens are its own.
        page_tables: for each sequence, the page of each ``page_size`` positions, the new ones included.
    """

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    page_tables: list[Sequence[int]] = field(default_factory=list)

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Self:
        """A pass over segments whose KV caches have room for their tokens."""
        made = cls()
        for segment in segments:
            start, count = segment.kv_cache.length, len(segment.token_ids)
            made.token_ids.extend(segment.token_ids)
            made.positions.extend(range(start, start + count))
            made.logit_rows.extend(range(len(made.token_ids) - segment.num_logits, len(made.token_ids)))
            made.starts.append(start)
            made.counts.append(count)
            made.page_tables.append(segment.kv_cache.page_table)
        return made
