"""Temporary folders that a killed process leaves until the next one makes its own in the same place.

A process holds a lock (flock) on its folder; the lock ends with the process, however that ends.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def scratch_folder(parent: Path, prefix: str, rescue: Callable[[Path], None] = lambda _: None) -> Iterator[Path]:
    """Yield a new folder, removed at the end; first remove those with this prefix whose processes have ended.

    Args:
        parent: of the folder.
        prefix: of its name; no other files in ``parent`` begin with it.
        rescue: called with each folder that a process left, before it is removed.

    Raises:
        OSError: the folder cannot be created.
    """
    for path in [path for path in parent.iterdir() if path.name.startswith(prefix)]:
        with suppress(OSError):  # another process holds the lock, or has removed it
            _remove_abandoned(path, rescue)
    folder, lock = _new_folder(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(folder: Path, rescue: Callable[[Path], None]) -> None:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        rescue(folder)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _new_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder, and the descriptor that locks it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(FileNotFoundError):  # another process may remove it before it is locked
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # where locks are not supported, nothing is removed either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)
