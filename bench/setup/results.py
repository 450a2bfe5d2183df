"""The results of a measurement: one JSON object with the machine, the versions, the settings and a row per case."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Self, TypeAlias

from rich.console import Console
from rich.table import Table

from protocol.errors import SettingsError

Value: TypeAlias = str | int | float | bool | list[int] | list[list[float | None]] | None
Row: TypeAlias = dict[str, Value]
_PACKAGES = ("numpy", "onnxruntime", "torch", "transformers", "pyzmq", "msgpack")


def machine() -> Row:
    """The processor, the number of cores that this process may use, and the system."""
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform()}


@dataclass(frozen=True)
class Results:
    """Rows of one measurement; every row has a ``case``."""

    settings: Mapping[str, Value]
    rows: Sequence[Mapping[str, Value]]
    machine: Mapping[str, Value] = field(default_factory=machine)

    def write(self, path: Path | None) -> None:
        """Write the JSON file, unless ``path`` is None. An interrupted write leaves the old file in place."""
        if path is None:
            return
        content = {
            "machine": dict(self.machine),
            "versions": {name: metadata.version(name) for name in _PACKAGES},
            "settings": dict(self.settings),
            "rows": [dict(row) for row in self.rows],
        }
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that ``write`` wrote.

        Raises:
            SettingsError: the file is missing or has other content.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(content["settings"], content["rows"], content["machine"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError("json", str(path), f"results of edgedraft-bench ({error!r})") from error

    def show(self, console: Console) -> None:
        """Print the rows; consecutive rows with the same columns form one table."""
        for names, rows in groupby(self.rows, key=tuple):
            table = Table(*(name.replace("_", " ") for name in names))
            for row in rows:
                table.add_row(*(format_value(value) for value in row.values()))
            console.print(table)


def number(row: Mapping[str, Value], name: str) -> float:
    """A column that holds a number."""
    value = row[name]
    assert isinstance(value, int | float), name
    return float(value)


def numbers(row: Mapping[str, Value], name: str) -> list[int]:
    """A column that holds counts."""
    value = row[name]
    assert isinstance(value, list), name
    return [count for count in value if isinstance(count, int)]


def format_value(value: Value) -> str:
    """Floats with three significant digits; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return " ".join(map(str, value))
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
