"""The cache of how far targets with int8 weights agree with their originals.

Measuring takes the original a minute of forward passes, quantizing its weights seconds. An entry belongs to the content
of the weights, the prompts and the versions of PyTorch and transformers.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from platformdirs import user_cache_path

from basestation.target.agreement import Agreement

logger = logging.getLogger(__name__)

_FORMAT = 2
"""Raised when entries are written, or what they hold is measured, otherwise than before."""


def agreement_entry(model: Any, prompts: Sequence[list[int]]) -> Path | None:
    """The file for a loaded model, which need not exist; None where the user has no cache directory."""
    try:
        cache = Path("/") / user_cache_path("edgedraft")
    except RuntimeError:
        return None
    settings = (_FORMAT, torch.__version__, transformers.__version__, str(model.dtype), prompts, model.config.to_dict())
    content = hashlib.sha256(repr(settings).encode())
    for name, parameter in model.named_parameters():
        content.update(name.encode())
        content.update(memoryview(parameter.detach().contiguous().view(torch.uint8).numpy()))
    return cache / "int8" / f"{content.hexdigest()}.json"


def read_agreement(entry: Path | None) -> Agreement | None:
    """The agreement of an entry; None where there is none, or a damaged one, which a log line names."""
    if entry is None:
        return None
    try:
        return Agreement(**json.loads(entry.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s cannot be read (%s); the agreement is measured again", entry, error)
        return None


def write_agreement(entry: Path | None, agreement: Agreement) -> None:
    """Keep an agreement; a log line says why where it cannot be kept."""
    if entry is None:
        return
    unfinished = entry.with_suffix(".unfinished")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(asdict(agreement)), encoding="utf-8")
        unfinished.replace(entry)
    except OSError as error:
        logger.warning("the agreement of int8 weights is not kept in %s: %s", entry, error.strerror)
