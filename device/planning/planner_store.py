"""Files in which a process leaves what its planners learnt for the next one.

One file for each bundle, base station, target, mode, kind of verification, Drafts ahead, prompt
lookup or none, and class of temperatures. A file that cannot be read or written costs the
figures, never an answer. Files are replaced as a whole, so that processes do not disturb each other.

Knows files; not what the figures are for.
"""

import hashlib
import json
import logging
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict
from math import ceil
from pathlib import Path

from device.planning.planner_figures import PlannerFigures
from device.settings import DraftSettings
from protocol.bundle import Manifest
from protocol.messages import Welcome

logger = logging.getLogger(__name__)

MAX_FILES = 64
_MAX_BYTES = 4096
_TEMPERATURE_STEP = 0.5
"""Temperatures up to the same multiple of this share their figures; 0 has its own."""


class PlannerStore:
    """Figures of one draft model at one base station.

    Args:
        folder: of the files; it is made when the first one is written.
        manifest: of the draft model.
        address: of the base station.
    """

    def __init__(self, folder: Path, manifest: Manifest, address: str) -> None:
        self._folder = folder
        self._bundle = hashlib.sha256(json.dumps(asdict(manifest), sort_keys=True).encode()).hexdigest()
        self._address = address

    def read(self, settings: DraftSettings, welcome: Welcome) -> PlannerFigures | None:
        """The figures for these settings and the Welcome's target; None where there are no usable ones."""
        path = self._path(settings, welcome)
        try:
            return PlannerFigures.of_json(json.loads(_read(path)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            logger.debug("%s is not used: %s", path, error)
            return None

    def write(self, settings: DraftSettings, welcome: Welcome, figures: PlannerFigures) -> None:
        """Replace the figures for these settings and the Welcome's target; the oldest files are deleted."""
        path = self._path(settings, welcome)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _replace(path, json.dumps(figures.to_json(), indent=1) + "\n")
            self._delete_oldest()
        except OSError as error:
            logger.debug("%s is not written: %s", path, error)

    def _path(self, settings: DraftSettings, welcome: Welcome) -> Path:
        target = welcome.model, welcome.vocab_size, welcome.stop_ids  # its context length depends on the free memory
        temperature = ceil(settings.sampling.temperature / _TEMPERATURE_STEP)
        drafting = settings.mode, asdict(settings.uplink), settings.drafts_ahead, settings.lookup
        key = json.dumps([self._bundle, self._address, target, drafting, settings.asks_block_verification, temperature])
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _delete_oldest(self) -> None:
        written: list[tuple[float, Path]] = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another process has replaced or deleted it
                written.append((path.stat().st_mtime, path))
        for _, path in sorted(written)[:-MAX_FILES]:
            path.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too long, or no file.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")  # opening a pipe would block
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"longer than {_MAX_BYTES} bytes")
    return content


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
