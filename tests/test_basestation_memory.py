"""Keys and values take memory from the system, and give it back whole."""

import random

import psutil
import pytest
import torch

from basestation.kv_pool import STEP, KVPool, KVShape, SequenceKVCache, Workspace
from basestation.memory import OutOfMemory, catch_out_of_memory

SHAPE = KVShape(8, 2, 64, torch.float32, torch.device("cpu"))
MEBIBYTE = 2**20


def new_kv_cache(kv_pool: KVPool, steps: int) -> SequenceKVCache:
    kv_cache = SequenceKVCache(kv_pool)
    kv_cache.reserve(steps * STEP)
    filling = torch.ones(SHAPE.kv_heads, steps * STEP, SHAPE.head_size)
    for layer in range(SHAPE.layers):
        kv_cache.store(layer, filling, filling, Workspace(0))
    return kv_cache


def test_stretches_that_came_and_went_leave_no_holes() -> None:
    chance, kv_pool = random.Random(0), KVPool(SHAPE, 10**9)  # noqa: S311 - any order will do
    process, kv_caches = psutil.Process(), list[SequenceKVCache]()
    before = process.memory_info().rss
    for _ in range(2000):
        kv_caches.append(new_kv_cache(kv_pool, chance.randint(1, 8)))
        if len(kv_caches) > 40:
            kv_caches.pop(chance.randrange(40)).release()
    held = sum(one.capacity for one in kv_caches) * SHAPE.position_bytes
    assert held > 100 * MEBIBYTE
    assert process.memory_info().rss - before < held + 20 * MEBIBYTE


def test_more_than_the_system_has_is_a_shortage() -> None:
    with pytest.raises(OutOfMemory, match="memory"), catch_out_of_memory():
        SequenceKVCache(KVPool(SHAPE, 2**60)).reserve(2**45)


def test_another_failure_of_the_system_is_not_taken_for_one() -> None:
    with pytest.raises(FileNotFoundError), catch_out_of_memory():
        raise FileNotFoundError(2, "no such file")
