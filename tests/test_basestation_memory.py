"""KV caches return their memory to the system, and out-of-memory errors are recognised."""

import random
import subprocess
import sys

import psutil
import pytest
import torch

from basestation.kv_pool import BLOCK_SIZE, KVPool, KVShape, SequenceKVCache
from basestation.memory import OutOfMemory, catch_out_of_memory

SHAPE = KVShape(8, 2, 64, torch.float32, torch.device("cpu"))
MEBIBYTE = 2**20
KEPT_BYTES = """
import ctypes, threading, psutil
from basestation.memory import return_free_memory, share_one_heap

share_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def use():
    libc.free(libc.malloc(2**24))  # from then on a heap may keep twice that at its end
    blocks = [libc.malloc(100_000) for _ in range(300)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    for block in blocks:
        libc.free(block)

before = psutil.Process().memory_info().rss
thread = threading.Thread(target=use)
thread.start()
thread.join()
return_free_memory()
print(psutil.Process().memory_info().rss - before)
"""


def new_kv_cache(kv_pool: KVPool, blocks: int) -> SequenceKVCache:
    kv_cache = SequenceKVCache(kv_pool)
    kv_cache.reserve(blocks * BLOCK_SIZE)
    filling = torch.ones(SHAPE.kv_heads, blocks * BLOCK_SIZE, SHAPE.head_size)
    for layer in range(SHAPE.layers):
        kv_cache.store(layer, filling, filling)
    return kv_cache


def test_released_kv_caches_leave_no_fragmentation() -> None:
    rng, kv_pool = random.Random(0), KVPool(SHAPE, 10**9)  # noqa: S311 - a fixed choice
    process, kv_caches = psutil.Process(), list[SequenceKVCache]()
    before = process.memory_info().rss
    for _ in range(2000):
        kv_caches.append(new_kv_cache(kv_pool, rng.randint(1, 8)))
        if len(kv_caches) > 40:
            kv_caches.pop(rng.randrange(40)).release()
    allocated = sum(one.capacity for one in kv_caches) * SHAPE.position_bytes
    assert allocated > 100 * MEBIBYTE
    assert process.memory_info().rss - before < allocated + 20 * MEBIBYTE


def test_what_a_thread_freed_returns_to_the_system() -> None:
    kept = subprocess.run([sys.executable, "-c", KEPT_BYTES], capture_output=True, text=True, check=True)
    assert int(kept.stdout) < 10 * MEBIBYTE


def test_more_memory_than_the_system_has_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemory, match="memory"), catch_out_of_memory():
        SequenceKVCache(KVPool(SHAPE, 2**60)).reserve(2**45)


def test_other_system_errors_are_not_out_of_memory() -> None:
    with pytest.raises(FileNotFoundError), catch_out_of_memory():
        raise FileNotFoundError(2, "no such file")
