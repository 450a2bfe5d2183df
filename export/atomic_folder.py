"""Folders that are written completely or not at all.

Knows temporary sibling folders and renames. Does not know what a folder holds.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import SettingsError


def is_free(folder: Path) -> bool:
    """Return whether ``folder`` does not exist or is empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling that replaces ``folder`` when the block succeeds.

    If the block raises, the sibling is deleted and ``folder`` is unchanged.

    Raises:
        SettingsError: the folder cannot be created, or not be replaced.
    """
    folder = folder.resolve()
    if folder.is_mount():
        raise SettingsError("the output folder", str(folder), "a folder within it: a mount point cannot be replaced")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sibling = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise SettingsError(
            "the output folder", str(folder), f"a folder that can be created ({error.strerror})"
        ) from error
    output = sibling / folder.name
    try:
        output.mkdir()
        yield output
        for path in output.iterdir():
            path.chmod(0o644)  # some converters write files with mode 600
        if folder.exists():
            folder.rename(sibling / "replaced")
        output.rename(folder)
    finally:
        shutil.rmtree(sibling)
