"""Where edgedraft keeps what it remembers between its processes."""

from pathlib import Path

from platformdirs import user_state_path


def state_folder() -> Path:
    """The user's folder, which need not exist; below the root where the user has no home."""
    try:
        return Path("/") / user_state_path("edgedraft")
    except RuntimeError:  # newer versions of platformdirs find no home, older ones return a relative path
        return Path("/.local/state/edgedraft")
