"""The TOML file that holds a program's settings: which one is read, and what it may hold.

Knows files and keys; not how flags and environment variables take precedence.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from common.setting import Setting
from common.standard_paths import may_exist, user_folder
from protocol.errors import SettingsError

_SYSTEM_FOLDER = Path("/etc")


def standard_file(program: str) -> Path | None:
    """The user's file of a program, or else the system's; None if there is neither. It may be unreadable."""
    folders = (user_folder("XDG_CONFIG_HOME", ".config"), _SYSTEM_FOLDER)
    candidates = [folder / "edgedraft" / f"{program}.toml" for folder in folders if folder]
    return next(filter(may_exist, candidates), None)


def read_settings_file(path: Path, settings: Mapping[str, Setting], context: typer.Context) -> dict[str, Any]:
    """The values in a file, by key.

    Args:
        path: the file.
        settings: those that it may hold, by key.
        context: of the command that reads it.

    Raises:
        SettingsError: the file cannot be read, or a key, a type or a value is not allowed.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError("the configuration file", str(path), f"a file in TOML ({reason})") from error
    for key, value in values.items():
        if key not in settings:
            raise SettingsError(f"a key in {path}", key, ", ".join(sorted(settings)))
        settings[key].check(context, value, str(path))
    return values
