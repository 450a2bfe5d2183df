"""Folders that are there whole or not at all.

Knows temporary siblings and renames. Does not know what a folder holds.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import SettingsError


def is_free(folder: Path) -> bool:
    """Whether ``folder`` does not exist or is empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling of ``folder`` that takes its place when the block ends well.

    When the block raises, the sibling goes and ``folder`` stays as it was.

    Raises:
        SettingsError: no folder can be made there.
    """
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sibling = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise SettingsError("the folder to write", str(folder), f"one that can be made ({error.strerror})") from error
    made = sibling / folder.name
    try:
        made.mkdir()
        yield made
        for path in made.iterdir():
            path.chmod(0o644)  # some tools write files that only their owner may read
        if folder.exists():
            folder.rename(sibling / "replaced")
        made.rename(folder)
    finally:
        shutil.rmtree(sibling)
