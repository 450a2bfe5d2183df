"""Memory moves to huge pages, and keeps its content."""

import mmap
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from device.drafting import huge_pages as module
from device.drafting.huge_pages import huge_pages

SIZE = 2**25
FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def mapped(byte: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, SIZE, FLAGS)
    memory.write(byte * SIZE)
    return memory


def bytes_in_huge_pages(memory: mmap.mmap) -> int:
    """Of the mappings that hold ``memory``."""
    address = np.frombuffer(memory, np.uint8).ctypes.data
    total, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(part, 16) for part in header.groups())
            is_inside = start < address + SIZE and address < end
        elif is_inside and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) * 1024
    return total


def test_memory_that_the_block_maps_moves_to_huge_pages_and_keeps_its_content() -> None:
    with huge_pages():
        memory = mapped(b"\x07")
    assert bytes_in_huge_pages(memory) >= (SIZE // 2 if module._SIZE_FILE.exists() else 0)
    assert memory[:] == b"\x07" * SIZE


def test_other_memory_stays_as_it_is() -> None:
    memory = mapped(b"\x07")
    if bytes_in_huge_pages(memory) == 0:  # the kernel gives huge pages on request only
        with huge_pages():
            pass
        assert bytes_in_huge_pages(memory) == 0


def test_a_kernel_without_huge_pages_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_SIZE_FILE", tmp_path / "missing")
    with huge_pages():
        memory = mapped(b"\x07")
    assert memory[:] == b"\x07" * SIZE


def test_peak_memory_grows_with_what_is_used_and_never_shrinks() -> None:
    code = f"""
from device.process_memory import peak_memory_bytes
before = peak_memory_bytes()
memory = bytearray(b"1") * {SIZE}
during = peak_memory_bytes()
del memory
print(before, during, peak_memory_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, during, after = map(int, done.stdout.split())
    assert before + 0.9 * SIZE < during < before + 2 * SIZE
    assert after == pytest.approx(during, rel=0.05)  # Linux counts pages in batches
