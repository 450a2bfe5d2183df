"""The cache of converted GGUF files: dequantizing takes minutes, mapping the resulting safetensors seconds.

An entry is a model folder without a tokenizer, named after the file's SHA-256, the
data type and the version of transformers. Does not know which models are supported.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from platformdirs import user_cache_path
from safetensors import SafetensorError

from basestation.sizes import readable_size
from common.error_text import first_line
from common.scratch_folder import scratch_folder

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Raised when entries are written otherwise than before."""


def cache_entry(file: Path, dtype: torch.dtype) -> Path | None:
    """The folder of a converted GGUF file, which need not exist; None where the user has no cache directory."""
    try:
        cache = Path("/") / user_cache_path("edgedraft")
    except RuntimeError:  # newer versions of platformdirs find no home, older ones return a relative path
        return None
    with file.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    precision = str(dtype).removeprefix("torch.")
    return cache / "gguf" / sha256 / f"{precision}-transformers-{transformers.__version__}-{_FORMAT}"


def fill(entry: Path, size: int, load: Callable[[], Any]) -> bool:
    """Write an entry completely or not at all, unless another process does; a log line says why there is none.

    Args:
        entry: the folder.
        size: of the weights in bytes.
        load: loads and dequantizes the model.

    Returns:
        Whether there is an entry.
    """
    with contextlib.ExitStack() as stack:
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_waiting_for_others(entry.parent))
            if entry.is_dir():
                return True
            unfinished = stack.enter_context(scratch_folder(entry.parent, ".unfinished-"))
            free = shutil.disk_usage(unfinished).free
        except OSError as error:
            return _not_written(entry, str(error.strerror))
        if size > free:
            return _not_written(entry, f"it takes {readable_size(size)}, and {readable_size(free)} are free")
        model = load()
        try:
            model.save_pretrained(unfinished)
            unfinished.replace(entry)
        except (OSError, SafetensorError) as error:
            return entry.is_dir() or _not_written(entry, first_line(error))
    return True


@contextlib.contextmanager
def _waiting_for_others(folder: Path) -> Iterator[None]:
    """Let one process of this machine after the other convert a file: each needs the memory of the whole model."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network file system may have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _not_written(entry: Path, reason: str) -> bool:
    logger.warning("the converted target is not kept in %s: %s", entry, reason)
    return False
