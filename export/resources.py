"""The disk and the memory that an export needs, compared with what is free."""

import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import psutil

from common.container_memory import within_limits
from protocol.errors import ModelError


def check_disk(needs: Mapping[Path, int]) -> None:
    """Check that the disks have room.

    Args:
        needs: the bytes that will be written below each folder, which need not exist yet.

    Raises:
        ModelError: a disk has less free space than all folders on it need.
    """
    needed: dict[int, int] = defaultdict(int)
    for folder, size in needs.items():
        existing = _existing(folder)
        disk = existing.stat().st_dev
        needed[disk] += size
        free = shutil.disk_usage(existing).free
        if needed[disk] > free:
            raise ModelError(
                f"{gigabytes(needed[disk])} of disk are needed and {gigabytes(free)} are free at {str(existing)!r}; "
                "free some space or choose another folder"
            )


def check_memory(size: int) -> None:
    """Check that ``size`` bytes of memory are available.

    Raises:
        ModelError: there are fewer.
    """
    free = within_limits(psutil.virtual_memory().available)
    if size > free:
        raise ModelError(
            f"{gigabytes(size)} of memory are needed and {gigabytes(free)} are free; "
            "end other programs or choose a smaller model"
        )


def gigabytes(size: int) -> str:
    """A size in bytes, as text in GB."""
    return f"{size / 1e9:.1f} GB"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.expanduser().resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())
