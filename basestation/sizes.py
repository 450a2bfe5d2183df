"""Sizes in bytes, as options and messages write them."""

import math
import re

from protocol.errors import SettingsError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
A_SIZE = "a size like 512MiB or 4GiB"


def parse_size(option: str, text: str, allowed: str = A_SIZE) -> int:
    """Bytes of a size like ``4GiB``, ``512M`` or ``1000000``; each unit is 1024 of the previous one.

    Raises:
        SettingsError: ``text`` is not a size.
    """
    found = _SIZE.fullmatch(text.strip())
    size = float(found[1]) * _UNITS[found[2].upper()] if found else math.inf
    if size == math.inf:
        raise SettingsError(option, text, allowed)
    return int(size)


def parse_kv_memory(text: str) -> int | None:
    """Bytes of ``--kv-memory``; None for ``auto``.

    Raises:
        SettingsError: ``text`` is neither.
    """
    return None if text == "auto" else parse_size("kv-memory", text, f"auto, or {A_SIZE}")


def readable_size(size: float) -> str:
    """A size in bytes, formatted with a unit."""
    unit = next((unit for unit in ("KiB", "MiB", "GiB") if size < 1024 * _UNITS[unit[0]]), "TiB")
    return f"{size / _UNITS[unit[0]]:.1f} {unit}"
