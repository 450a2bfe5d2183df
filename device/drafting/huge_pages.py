"""Huge pages for a draft model's weights.

Decoding reads all weights for each token. With pages of 4 KiB nearly every page misses
the TLB, and in a virtual machine a miss costs two walks through page tables; a huge
page maps 2 MiB at once. The C library asks for none unless its environment says so.

Knows Linux's memory maps; not what the memory holds.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SIZE_FILE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MADV_COLLAPSE = 25  # Linux 6.1 and later


@contextmanager
def huge_pages() -> Iterator[None]:
    """Move the private memory that the block maps to huge pages, where whole ones fit.

    Advice: memory for which the kernel has no huge page stays as it is.
    """
    size = int(_SIZE_FILE.read_text(encoding="ascii")) if _SIZE_FILE.exists() else None
    before = _blocks(size) if size else set()
    yield
    if size:
        madvise = ctypes.CDLL(None).madvise
        for address in sorted(_blocks(size) - before):
            madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_COLLAPSE)


def _blocks(size: int) -> set[int]:
    """The aligned addresses of all blocks of ``size`` bytes in this process's private, writable memory of no file."""
    blocks: set[int] = set()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        addresses, permissions, _, _, inode, *_ = line.split()
        if permissions == "rw-p" and inode == "0":
            start, end = (int(address, 16) for address in addresses.split("-"))
            blocks.update(range(-(-start // size) * size, end - size + 1, size))
    return blocks
