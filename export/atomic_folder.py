"""Folders that are written completely or not at all.

Knows temporary sibling folders and renames. Does not know what a folder holds.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from common.scratch_folder import scratch_folder
from protocol.errors import SettingsError


def is_free(folder: Path) -> bool:
    """Return whether ``folder`` does not exist or is empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``; those that killed processes left there are removed.

    Raises:
        SettingsError: ``folder`` cannot be created, or not be replaced.
    """
    folder = folder.resolve()
    if folder.is_mount():
        raise SettingsError("the output folder", str(folder), "a folder within it: a mount point cannot be replaced")
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            prefix = f".{folder.name}.unfinished-"
            scratch = stack.enter_context(scratch_folder(folder.parent, prefix, partial(_restore, folder)))
        except OSError as error:
            raise SettingsError(
                "the output folder", str(folder), f"a folder that can be created ({error.strerror})"
            ) from error
        yield scratch


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``folder`` when the block succeeds.

    If the block raises, the temporary folder is deleted and ``folder`` is unchanged.

    Raises:
        SettingsError: the folder cannot be created, or not be replaced.
    """
    folder = folder.resolve()
    with scratch_beside(folder) as scratch:
        output = scratch / folder.name
        output.mkdir()
        yield output
        for path in output.iterdir():
            path.chmod(0o644)  # some converters write files with mode 600
        try:
            if folder.exists():
                folder.rename(scratch / _replaced(folder))
            output.rename(folder)
        finally:
            _restore(folder, scratch)


def _restore(folder: Path, scratch: Path) -> None:
    """Put the old folder back where the new one did not take its place."""
    replaced = scratch / _replaced(folder)
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)


def _replaced(folder: Path) -> str:
    return f"{folder.name}.replaced"
