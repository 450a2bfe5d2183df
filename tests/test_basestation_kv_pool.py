"""The KV pool: no page is lost or used twice, and every sequence finds what it wrote."""

import random
from collections import Counter

import pytest

from basestation.kv_cache.kv_pool import KVPool, SequenceKVCache, runs
from basestation.kv_cache.memory import OutOfMemory

PAGES, SIZE, SEQUENCES = 40, 4, 10
OPERATIONS = 100_000
WINDOW = 6


class Recorded:
    """A pool with sequences that write numbers to their positions, and a plain list of what each of them holds."""

    def __init__(self) -> None:
        self.freed: list[int] = []
        self.pool = KVPool(PAGES, SIZE, self.freed.extend)
        self.kv_caches = [SequenceKVCache(self.pool) for _ in range(SEQUENCES)]
        self.expected: list[list[int]] = [[] for _ in range(SEQUENCES)]
        self.stored = [[-1] * SIZE for _ in range(PAGES)]

    def write(self, index: int, numbers: list[int]) -> None:
        kv_cache = self.kv_caches[index]
        missing = self.pool.pages_for(kv_cache.length + len(numbers)) * SIZE - kv_cache.capacity
        if missing > self.pool.free:
            with pytest.raises(OutOfMemory, match="pages of the KV pool are needed"):
                kv_cache.reserve(kv_cache.length + len(numbers))
            return
        kv_cache.reserve(kv_cache.length + len(numbers))
        for position, number in enumerate(numbers, kv_cache.length):
            self.stored[kv_cache.page_table[position // SIZE]][position % SIZE] = number
        kv_cache.length += len(numbers)
        self.expected[index] += numbers

    def rollback(self, index: int, length: int) -> None:
        kv_cache = self.kv_caches[index]
        kept = min(length, kv_cache.length)
        partly = dict(enumerate(kv_cache.pages, kv_cache.unseen)).get(kept // SIZE)
        if partly is not None and sum(partly in one.pages for one in self.kv_caches) > 1:
            kept -= kept % SIZE
        if kv_cache.unseen and kept - WINDOW + 1 < kv_cache.unseen * SIZE:
            kept = 0
        kv_cache.rollback(length)
        assert kv_cache.length == kept
        del self.expected[index][kept:]

    def share(self, index: int, source: int, length: int) -> None:
        self.kv_caches[index].share_prefix(self.kv_caches[source], length)
        self.expected[index] = self.expected[source][:length]

    def slide(self, index: int, length: int) -> None:
        kv_cache = self.kv_caches[index]
        before = kv_cache.unseen
        kv_cache.give_back_unseen(length, WINDOW)
        assert kv_cache.unseen == max(before, (length - WINDOW + 1) // SIZE)

    def release(self, index: int) -> None:
        self.kv_caches[index].release()
        self.expected[index] = []

    def check(self) -> None:
        users = Counter(page for one in self.kv_caches for page in one.pages)
        assert self.pool.used == len(users) * SIZE
        assert self.pool.used + self.pool.free == self.pool.capacity == PAGES * SIZE
        assert self.pool.shared == (users.total() - len(users)) * SIZE
        for kv_cache, expected in zip(self.kv_caches, self.expected, strict=True):
            assert len(set(kv_cache.pages)) == len(kv_cache.pages)
            assert kv_cache.length == len(expected) <= kv_cache.capacity
            found = [number for page in kv_cache.pages for number in self.stored[page]]
            first = kv_cache.unseen * SIZE
            assert found[: kv_cache.length - first] == expected[first:]
            assert kv_cache.page_table[kv_cache.unseen :] == kv_cache.pages
        assert not users.keys() & self.freed, "a page that is used was reported as free"
        self.freed.clear()


def test_random_operations_lose_no_page_and_no_content() -> None:
    """Open, grow, roll back, share, evict and release, against plain lists."""
    rng = random.Random(0)  # noqa: S311 - a fixed choice
    recorded, done = Recorded(), Counter[str]()
    for number in range(OPERATIONS):
        index, other = rng.sample(range(SEQUENCES), 2)
        action = rng.choices(("write", "rollback", "share", "slide", "release"), (60, 20, 14, 4, 4))[0]
        held = len(recorded.expected[index])
        if action == "write":
            recorded.write(index, [number] * rng.randint(1, 2 * SIZE))
        elif action == "rollback":
            recorded.rollback(index, rng.randint(0, held + 2))
        elif action == "share":
            least = recorded.pool.pages_for(recorded.kv_caches[other].shortest)
            most = len(recorded.expected[other]) // SIZE
            recorded.share(index, other, rng.randint(least, most) * SIZE if least <= most else 0)
        elif action == "slide":
            recorded.slide(index, rng.randint(held - held // 3, held))
        else:
            recorded.release(index)
        done[action] += recorded.pool.shared > 0
        done["pool full"] += recorded.pool.free == 0
        recorded.check()
    assert (
        min(done[name] for name in ("write", "rollback", "share", "slide", "release", "pool full")) > OPERATIONS // 50
    )
    for index in range(SEQUENCES):
        recorded.release(index)
    assert (recorded.pool.used, recorded.pool.shared) == (0, 0)
    assert recorded.pool.take(PAGES, None) == list(range(PAGES)), "the free pages are one run again"


def test_sequences_that_grow_in_turns_stay_in_one_run_each() -> None:
    pool = KVPool(256)
    kv_caches = [SequenceKVCache(pool) for _ in range(16)]
    for length in range(1, 9 * pool.page_size, 50):
        for kv_cache in kv_caches:
            kv_cache.reserve(length)
    assert [len(runs(one.pages)) for one in kv_caches] == [1] * 16


def test_one_sequence_can_have_all_pages_that_others_left_scattered() -> None:
    pool = KVPool(64)
    kv_caches = [SequenceKVCache(pool) for _ in range(64)]
    for kv_cache in kv_caches:
        kv_cache.reserve(1)
    kv_caches.sort(key=lambda one: one.pages)
    for kv_cache in kv_caches[::2]:
        kv_cache.release()
    kv_caches[0].reserve(32 * pool.page_size)
    assert pool.free == 0
    assert len(runs(kv_caches[0].pages)) == 32


def test_runs_are_told_apart() -> None:
    assert runs([]) == []
    assert runs([4]) == [range(4, 5)]
    assert runs([4, 5, 6, 2, 3, 9]) == [range(4, 7), range(2, 4), range(9, 10)]
