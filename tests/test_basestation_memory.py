"""What fits into memory: refusals, free KV pages that return theirs to the system, and out-of-memory errors."""

import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from basestation.kv_cache import memory
from basestation.kv_cache.kv_pages import KVPages, KVShape
from basestation.kv_cache.kv_pool import KVPool, SequenceKVCache
from basestation.kv_cache.memory import OutOfMemory, catch_out_of_memory, check_fits, kv_budget, parameter_count
from basestation.sizes import parse_size
from basestation.target import packed_linear
from basestation.target.pretrained import weight_files
from protocol.errors import ModelError, SettingsError
from tests.tiny_target import CPU, tiny_config

SHAPE = KVShape(8, 2, 64, torch.float32, torch.device("cpu"))
MEBIBYTE = 2**20
KEPT_BYTES = """
import ctypes, threading, psutil
from basestation.kv_cache.heap import return_free_memory, share_one_heap

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


def test_free_pages_take_no_memory() -> None:
    """Sequences come and go; pages that were used before are given back to the system."""
    rng, process = random.Random(0), psutil.Process()  # noqa: S311 - a fixed choice
    before = process.memory_info().rss
    kv_pages = KVPages(SHAPE, 10_000)
    kv_pool, kv_caches = KVPool(kv_pages.count, SHAPE.page_size, kv_pages.discard), list[SequenceKVCache]()
    for _ in range(300):
        kv_caches.append(kv_cache := SequenceKVCache(kv_pool))
        count = rng.randint(1, 8) * SHAPE.page_size
        kv_cache.reserve(count)
        for page in kv_cache.pages:
            slots = torch.arange(page * SHAPE.page_size, (page + 1) * SHAPE.page_size, device="cpu")
            filling = torch.ones(SHAPE.kv_heads, SHAPE.page_size, SHAPE.head_size, device="cpu")
            for layer in range(SHAPE.layers):
                kv_pages.write(layer, slots, filling, filling)
        if len(kv_caches) > 40:
            kv_caches.pop(rng.randrange(40)).release()
    allocated = kv_pool.used * SHAPE.position_bytes
    assert allocated > 100 * MEBIBYTE
    assert process.memory_info().rss - before < allocated + 20 * MEBIBYTE


def test_what_a_thread_freed_returns_to_the_system() -> None:
    kept = subprocess.run([sys.executable, "-c", KEPT_BYTES], capture_output=True, text=True, check=True)
    assert int(kept.stdout) < 10 * MEBIBYTE


def test_more_memory_than_the_system_has_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemory, match="memory"), catch_out_of_memory():
        KVPages(SHAPE, 2**32)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory",
        "std::bad_alloc",
    ],
)
def test_every_text_of_a_failed_allocation_is_out_of_memory(text: str) -> None:
    with pytest.raises(OutOfMemory, match=re.escape(text.splitlines()[0])), catch_out_of_memory():
        raise RuntimeError(text)


def test_what_numpy_and_python_cannot_allocate_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemory, match="Unable to allocate"), catch_out_of_memory():
        np.empty(2**60, np.int8)
    with pytest.raises(OutOfMemory, match="memory"), catch_out_of_memory():
        raise MemoryError


def test_other_errors_of_a_gpu_are_not_out_of_memory() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access") as caught, catch_out_of_memory():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert not isinstance(caught.value, OutOfMemory)


def test_weights_that_do_not_fit_into_the_hosts_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda placement: {"cpu": 2**30, "cuda": 2**36}[placement.type])
    memory.check_host(2**30)
    with pytest.raises(ModelError, match=r"takes 3\.0 GiB of the host's memory at once, and 1\.0 GiB are free"):
        memory.check_host(3 * 2**30)


def test_other_system_errors_are_not_out_of_memory() -> None:
    with pytest.raises(FileNotFoundError), catch_out_of_memory():
        raise FileNotFoundError(2, "no such file")


def test_a_target_that_does_not_fit_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama", hidden_size=1024, num_hidden_layers=16, intermediate_size=4096, vocab_size=32000)
    check_fits(config, torch.float32, CPU)
    monkeypatch.setattr(memory, "free_memory", lambda _: 2**20)
    with pytest.raises(
        ModelError, match=r"0\.27 billion parameters in float32 take 1\.0 GiB, and 1\.0 MiB are free on cpu"
    ):
        check_fits(config, torch.float32, CPU)


def test_sizes_are_parsed_with_their_units() -> None:
    sizes = {"4GiB": 2**32, "512M": 2**29, "1.5 gb": 3 * 2**29, "1000": 1000, "2KiB": 2048}
    assert {text: parse_size("kv-memory", text) for text in sizes} == sizes
    for text in ("", "much", "-1", "4 XB", "4GiB more", "9" * 400):
        with pytest.raises(SettingsError, match="kv-memory"):
            parse_size("kv-memory", text)
    assert kv_budget("1GiB", CPU) == 2**30
    assert 0 < kv_budget("auto", CPU) < memory.free_memory(CPU)


def test_a_target_for_int8_weights_needs_the_memory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "packed_dtype", lambda _: torch.float32)  # no bfloat16 instructions
    config = tiny_config("llama")
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(memory, "free_memory", lambda _: 2 * parameter_count(config))
    assert weight_files(str(tmp_path), torch.bfloat16, CPU, 1, int8=True, use_cache=True) == str(tmp_path)
    with pytest.raises(ModelError, match="parameters in bfloat16 take"):
        weight_files(str(tmp_path), torch.bfloat16, CPU, 1, int8=False, use_cache=True)
