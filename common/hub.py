"""Models from a hub: from the local cache, or downloaded; a hub that does not answer is given up within seconds."""

import json
import threading
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from common.error_text import first_line
from protocol.errors import ModelError

_TIMEOUT = 4.0
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
"""A model has one of these."""


def hub_folder(name: str, patterns: Sequence[str]) -> Path:
    """The folder of the model ``name`` in the local cache; files that are missing there are downloaded.

    Args:
        name: on the hub, like ``OWNER/MODEL``.
        patterns: of the files that are needed.

    Raises:
        ModelError: there is no such model, neither hub nor cache has all of it, or its download fails.
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
        folder = Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=True))
    except Exception as error:
        raise ModelError(
            f"{name!r} is not a local folder and cannot be downloaded from the hub ({reason}); "
            "allowed: a model folder, a hub name or a .gguf file"
        ) from error
    if missing := _missing(folder, patterns):
        files = f"{missing[0]} and {len(missing) - 1} more files" if len(missing) > 1 else missing[0]
        raise ModelError(
            f"the cache lacks {files} of {name!r}, and the hub cannot be used ({reason}); "
            "run the command again once it answers, or give a model folder"
        )
    return folder


def model_name(model: str) -> str:
    """The name of a model: its folder's, without ``.gguf`` its file's, or the last part of its hub name."""
    path = Path(model)
    return (path.resolve() if path.name in ("", "..") else path).name.removesuffix(".gguf")


def _missing(folder: Path, patterns: Sequence[str]) -> list[str]:
    """The files that a model cannot be loaded without, of those that match, and a folder in the cache lacks."""
    weights, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / weights[0]).is_file() and index.is_file():
        weights = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [file for file in ("config.json", *weights) if not (folder / file).is_file()]
    if not any((folder / file).is_file() for file in _TOKENIZERS):
        missing.append(_TOKENIZERS[0])
    return [file for file in missing if any(fnmatch(file, pattern) for pattern in patterns)]


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
            outcome.append(_reason(error))

    thread = threading.Thread(target=ask, name="hub", daemon=True)
    thread.start()
    thread.join(_TIMEOUT)
    return outcome[0] if outcome else f"no answer within {_TIMEOUT:.0f} s"


def _reason(error: BaseException) -> str:
    """What a client's error says, or where the system refused the connection, what that said."""
    root = error
    while cause := root.__cause__ or root.__context__:
        root = cause
    if isinstance(root, OSError) and root.strerror:
        return f"no connection: {root.strerror}"
    return first_line(error)
