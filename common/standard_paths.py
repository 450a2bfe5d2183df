"""Where the files of a user are looked for, and whether one is there.

A file that cannot be looked at counts as there, so that whoever reads it learns the reason.
"""

import os
from pathlib import Path


def user_folder(variable: str, below_home: str) -> Path | None:
    """The folder for the user's files of a kind; None if the user may not enter the home, as with ``ProtectHome=yes``.

    Args:
        variable: the environment variable that may name the folder (XDG base directory specification).
        below_home: where the folder is otherwise.
    """
    if given := os.environ.get(variable):
        return Path(given)
    home = Path(os.environ.get("HOME") or "/")
    # Looking for a file in the home needs the permission to enter it, whether the file exists or not.
    return None if isinstance(_failure(home / "edgedraft"), PermissionError) else home / below_home


def may_exist(path: Path) -> bool:
    """Whether a path exists, or that cannot be told."""
    return not isinstance(_failure(path), FileNotFoundError | NotADirectoryError)


def _failure(path: Path) -> OSError | None:
    """Why a path cannot be looked at."""
    try:
        path.stat()
    except OSError as error:
        return error
    return None
