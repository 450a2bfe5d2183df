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
from rich.measure import Measurement
from rich.table import Table

from protocol.errors import SettingsError

Value: TypeAlias = str | int | float | bool | list[int] | list[list[float | None]] | None
Row: TypeAlias = dict[str, Value]
_ANY_WIDTH = 10_000
_PACKAGES = ("numpy", "onnxruntime", "torch", "transformers", "pyzmq", "msgpack")


def machine() -> Row:
    """The processor, the number of cores that this process may use, and the system."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of the packages that figures depend on."""
    return {name: metadata.version(name) for name in _PACKAGES}


@dataclass(frozen=True)
class Results:
    """Rows of one measurement; every row has a ``case``."""

    settings: Mapping[str, Value]
    rows: Sequence[Mapping[str, Value]]
    machine: Mapping[str, Value] = field(default_factory=machine)
    versions: Mapping[str, str] = field(default_factory=versions)

    def write(self, path: Path | None) -> None:
        """Write the JSON file, unless ``path`` is None. An interrupted write leaves the old file in place."""
        if path is None:
            return
        content = {
            "machine": dict(self.machine),
            "versions": dict(self.versions),
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
            return cls(content["settings"], content["rows"], content["machine"], content["versions"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError("json", str(path), f"results of edgedraft-bench ({error!r})") from error

    def show(self, console: Console) -> None:
        """Print the rows; consecutive rows with the same columns form one table, too wide a one a table per row."""
        for _, group in groupby(self.rows, key=tuple):
            rows = list(group)
            table = _table_of(rows)
            if Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).minimum <= console.width:
                console.print(table)
                continue
            for row in rows:
                console.print(_table_per_column(row))


def _table_of(rows: Sequence[Mapping[str, Value]]) -> Table:
    table = Table(*map(_heading, rows[0]))
    for row in rows:
        table.add_row(*map(format_value, row.values()))
    return table


def _table_per_column(row: Mapping[str, Value]) -> Table:
    """A line for each column of one row, below its case."""
    table = Table("case", str(row["case"]))
    for name, value in row.items():
        if name != "case":
            table.add_row(_heading(name), format_value(value))
    return table


def _heading(name: str) -> str:
    return name.replace("_", " ")


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
