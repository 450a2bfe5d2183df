"""The memory that Linux's control groups leave this process, in a container or a service with a limit."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MEMBERSHIP = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


class _Files(NamedTuple):
    """Where a group's limit and usage are, and the name in ``memory.stat`` of page cache that can be dropped."""

    limit: str
    usage: str
    inactive_cache: str


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def within_limits(available: int) -> int:
    """What the limits of this process leave of the machine's ``available`` bytes."""
    return min([available, *_left()])


def _left() -> Iterator[int]:
    """Bytes that each limit leaves."""
    try:
        groups = _MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # not Linux
        return
    for group in groups:
        number, controllers, path = group.split(":", 2)
        if number == "0":
            yield from _left_in(_ROOT, path, _VERSION_2)
        elif "memory" in controllers.split(","):
            yield from _left_in(_ROOT / "memory", path, _VERSION_1)


def _left_in(mount: Path, path: str, files: _Files) -> Iterator[int]:
    """Bytes that a group and those above it leave; a container sees only its own group, as ``mount``."""
    folder = mount / path.lstrip("/")
    for one in (folder, *folder.parents):
        if not one.is_relative_to(mount) or not (one / files.limit).exists():
            continue
        limit = (one / files.limit).read_text(encoding="ascii").strip()
        if limit != "max":
            cache = dict(line.split() for line in (one / "memory.stat").read_text(encoding="ascii").splitlines())
            used = int((one / files.usage).read_text(encoding="ascii")) - int(cache[files.inactive_cache])
            yield max(0, int(limit) - used)
