"""Models from a hub: from the local cache, or downloaded; a hub that does not answer is given up within seconds."""

import threading
from collections.abc import Sequence
from pathlib import Path

from common.error_text import first_line
from protocol.errors import ModelError

_TIMEOUT = 4.0


def hub_folder(name: str, patterns: Sequence[str]) -> Path:
    """The folder of the model ``name`` in the local cache; files that are missing there are downloaded.

    Args:
        name: on the hub, like ``OWNER/MODEL``.
        patterns: of the files that are needed.

    Raises:
        ModelError: there is no such model, neither hub nor cache has it, or its download fails: a folder in the cache
            does not tell which files it lacks.
    """
    from huggingface_hub import snapshot_download  # only for names that are not local

    reason = _refusal(name)
    if reason is None:
        try:
            return Path(snapshot_download(name, allow_patterns=list(patterns), etag_timeout=_TIMEOUT))
        except Exception as error:  # requests' or httpx' by version
            raise ModelError(
                f"the download of {name!r} from the hub failed ({first_line(error)}); run the command again to go on"
            ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=True))
    except Exception as error:
        raise ModelError(
            f"{name!r} is not a local folder and cannot be downloaded from the hub ({reason}); "
            "allowed: a model folder, a hub name or a .gguf file"
        ) from error


def model_name(model: str) -> str:
    """The name of a model: its folder's, without ``.gguf`` its file's, or the last part of its hub name."""
    path = Path(model)
    return (path.resolve() if path.name in ("", "..") else path).name.removesuffix(".gguf")


def _refusal(name: str) -> str | None:
    """Why the hub does not give a model; None if it does.

    The thread bounds what the client's own timeout does not: name resolution, and several addresses in turn.
    """
    from huggingface_hub import HfApi

    outcome: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name, timeout=_TIMEOUT)
            outcome.append(None)
        except Exception as error:  # noqa: BLE001 - reported by the caller
            outcome.append(first_line(error))

    thread = threading.Thread(target=ask, name="hub", daemon=True)
    thread.start()
    thread.join(_TIMEOUT)
    return outcome[0] if outcome else f"no answer within {_TIMEOUT:.0f} s"
