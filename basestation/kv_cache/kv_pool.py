"""The KV pool: which pages are free, and which sequences use the others.

A page holds the keys and values of ``page_size`` positions, a sequence is a list of
pages, and a shared prefix is pages that several sequences list, counted by reference.
Growing, rollback, eviction, release and sharing move page numbers; nothing is copied.

Knows numbers; not tensors (``kv_pages.py``), sessions or messages.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from basestation.kv_cache.memory import OutOfMemory

PAGE_SIZE = 128
"""Positions of a page on a CPU."""


class KVPool:
    """Pages, each of them free or used by one or more sequences.

    Args:
        pages: in total.
        page_size: positions of a page.
        on_free: called with the pages of each run that became free.

    Attributes:
        page_size: see above.
        shared: positions saved by prefix sharing.
    """

    def __init__(
        self, pages: int, page_size: int = PAGE_SIZE, on_free: Callable[[range], object] | None = None
    ) -> None:
        self.page_size = page_size
        self.shared = 0
        self._ref_counts = [0] * pages
        self._used_pages = 0
        self._gaps = _Gaps(pages)
        self._on_free = on_free

    @property
    def capacity(self) -> int:
        """Positions in total."""
        return len(self._ref_counts) * self.page_size

    @property
    def used(self) -> int:
        """Positions of used pages; a shared page counts once."""
        return self._used_pages * self.page_size

    @property
    def free(self) -> int:
        """Positions of free pages."""
        return self.capacity - self.used

    def pages_for(self, length: int) -> int:
        """How many pages hold ``length`` positions."""
        return -(-length // self.page_size)

    def round_up(self, length: int) -> int:
        """The capacity of a KV cache for ``length`` positions: whole pages."""
        return self.pages_for(length) * self.page_size

    def is_shared(self, page: int) -> bool:
        """Whether more than one sequence uses a page."""
        return self._ref_counts[page] > 1

    def take(self, count: int, after: int | None) -> list[int]:
        """Take free pages, in as few runs as there are, the first of them right behind page ``after`` if it is free.

        Raises:
            OutOfMemory: fewer are free.
        """
        if count * self.page_size > self.free:
            raise OutOfMemory(f"{count} pages of the KV pool are needed and {self.free // self.page_size} are free")
        pages: list[int] = []
        while len(pages) < count:
            run = self._gaps.take(count - len(pages), after)
            pages += run
            after = run[-1]
        for page in pages:
            self._ref_counts[page] = 1
        self._used_pages += count
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Add a reference to each of these used pages."""
        for page in pages:
            self._ref_counts[page] += 1
        self.shared += len(pages) * self.page_size

    def give_back(self, pages: Sequence[int]) -> None:
        """Remove a reference to each of these pages; with its last one a page is free."""
        for page in pages:
            self._ref_counts[page] -= 1
        unused = [page for page in pages if not self._ref_counts[page]]
        self._used_pages -= len(unused)
        self.shared -= (len(pages) - len(unused)) * self.page_size
        for run in runs(unused):
            self._gaps.give_back(run)
            if self._on_free:
                self._on_free(run)


class SequenceKVCache:
    """The pages of one sequence.

    Pages that its next positions fall into are never shared, so a forward pass writes to no page of another.

    Attributes:
        length: cached positions.
        pages: those of its positions in order, and then pages reserved for more.
        unseen: how many pages before these were given back, because no later position sees them.
    """

    def __init__(self, kv_pool: KVPool) -> None:
        self.length = 0
        self.pages: list[int] = []
        self.unseen = 0
        self._window = 0
        self._kv_pool = kv_pool

    @property
    def page_size(self) -> int:
        """Positions of a page."""
        return self._kv_pool.page_size

    @property
    def capacity(self) -> int:
        """Positions up to the end of its pages."""
        return (self.unseen + len(self.pages)) * self.page_size

    @property
    def page_table(self) -> list[int]:
        """The page of each ``page_size`` positions; any number for those that were given back."""
        return [0] * self.unseen + self.pages

    @property
    def shortest(self) -> int:
        """The fewest of its positions that another sequence can share, or that can be left after a rollback."""
        return self.unseen * self.page_size + self._window - 1 if self.unseen else 0

    def reserve(self, length: int) -> None:
        """Grow the capacity to ``length`` positions or more.

        Raises:
            OutOfMemory: the pool has too few free pages.
        """
        missing = self._kv_pool.pages_for(length) - self.unseen - len(self.pages)
        if missing > 0:
            self.pages += self._kv_pool.take(missing, self.pages[-1] if self.pages else None)

    def release(self) -> None:
        """Drop all positions and give back the pages."""
        self.rollback(0)
        self._drop_all()

    def rollback(self, length: int) -> None:
        """Drop the positions from ``length`` on; a shared page that is only partly kept is dropped whole.

        If the next position would see pages that were given back, all positions are dropped.
        """
        self.length = min(self.length, length)
        next_page = max(0, self.length // self.page_size - self.unseen)
        later = range(next_page, len(self.pages))
        if (shared := next((one for one in later if self._kv_pool.is_shared(self.pages[one])), None)) is not None:
            self._give_back_from(shared)
            self.length = min(self.length, (self.unseen + shared) * self.page_size)
        if self.length < self.shortest:
            self._drop_all()

    def give_back_reserved(self, length: int) -> None:
        """Give back the pages beyond those of the first ``length`` positions."""
        self._give_back_from(max(0, self._kv_pool.pages_for(length) - self.unseen))

    def give_back_unseen(self, length: int, window: int) -> None:
        """Give back the pages that no position from ``length`` on sees, where each sees ``window``, itself included."""
        unseen = max(0, length - window + 1) // self.page_size
        if unseen > self.unseen:
            self._kv_pool.give_back(self.pages[: unseen - self.unseen])
            del self.pages[: unseen - self.unseen]
            self.unseen, self._window = unseen, window

    def share_prefix(self, source: "SequenceKVCache", length: int) -> None:
        """Replace the content by the first ``length`` positions of ``source``, in pages that both use.

        Args:
            source: a cache of the same first tokens.
            length: a multiple of the page size, from the ``shortest`` of ``source`` to its length, or 0.
        """
        if length == 0:
            self.release()
            return
        assert source.shortest <= length <= source.length
        assert length % self.page_size == 0
        pages = source.pages[: length // self.page_size - source.unseen]
        self._kv_pool.share(pages)
        self.release()
        self.pages, self.length = pages, length
        self.unseen, self._window = source.unseen, source._window

    def _drop_all(self) -> None:
        self._give_back_from(0)
        self.length = self.unseen = 0

    def _give_back_from(self, index: int) -> None:
        self._kv_pool.give_back(self.pages[index:])
        del self.pages[index:]


def runs(pages: Sequence[int]) -> list[range]:
    """The runs of consecutive page numbers that ``pages`` consists of, in its order."""
    ends = [index for index, (one, other) in enumerate(pairwise(pages), start=1) if other != one + 1]
    bounds = pairwise([0, *ends, len(pages)])
    return [range(pages[first], pages[end - 1] + 1) for first, end in bounds if first < end]


class _Gaps:
    """The free pages as runs, each as long as it can be."""

    def __init__(self, pages: int) -> None:
        self._end_of = {0: pages}
        self._start_of = {pages: 0}

    def take(self, most: int, after: int | None) -> range:
        """A run of at most ``most`` pages: right behind page ``after``, or in the middle of the longest gap.

        So there is room behind the new run, and behind the one that ends before the gap.
        """
        if after is not None and after + 1 in self._end_of:
            start = first = after + 1
            end = self._end_of[start]
        else:
            start, end = max(self._end_of.items(), key=lambda gap: gap[1] - gap[0])
            first = start + max(0, end - start - most) // 2 if start else 0
        run = range(first, min(first + most, end))
        self._remove(start, end)
        self._add(start, run.start)
        self._add(run.stop, end)
        return run

    def give_back(self, run: range) -> None:
        """Add a run of pages, joined with the gaps beside it."""
        start, end = self._start_of.get(run.start, run.start), self._end_of.get(run.stop, run.stop)
        self._remove(start, run.start)
        self._remove(run.stop, end)
        self._add(start, end)

    def _add(self, start: int, end: int) -> None:
        if start < end:
            self._end_of[start], self._start_of[end] = end, start

    def _remove(self, start: int, end: int) -> None:
        if start < end:
            del self._end_of[start], self._start_of[end]
