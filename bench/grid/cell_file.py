"""The result file of a grid, which grows by one cell at a time, so that an interrupted run can be continued."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from bench.grid.cells import Case
from bench.grid.summary import is_quiet
from bench.setup.results import Results, Row, Value, machine, versions
from protocol.errors import SettingsError


class Cell(Protocol):
    """What is measured at once: a cell of the grid, or another part of a measurement."""

    def has(self, row: Mapping[str, Value]) -> bool:
        """Whether ``row`` belongs to it."""


class CellFile:
    """Rows by cell, written to the file whenever a cell is added.

    Args:
        path: of the JSON file; None keeps the rows in memory only.
        settings: shared by all cells.

    Raises:
        SettingsError: the file has other content, or was measured with other settings or versions, or elsewhere.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Value]) -> None:
        self._path = path
        self._settings = settings
        self._rows: list[Row] = []
        if path is not None and path.exists():
            previous = Results.read(path)
            if previous.settings != settings:
                raise SettingsError("json", str(path), f"a new file, or one measured with {dict(settings)}")
            if (here := dict(machine())) != dict(previous.machine):
                raise SettingsError("json", str(path), f"a new file, or one measured on this machine, {here}")
            if (installed := versions()) != dict(previous.versions):
                raise SettingsError("json", str(path), f"a new file, or one measured with {installed}")
            self._rows = [dict(row) for row in previous.rows]

    @property
    def results(self) -> Results:
        """All rows so far."""
        return Results(self._settings, self._rows)

    def rows_of(self, cell: Cell) -> list[Row]:
        """The rows of a cell; empty if it was not measured."""
        return [row for row in self._rows if cell.has(row)]

    def is_done(self, cell: Cell, cases: Sequence[Case], quiet: bool = False) -> bool:
        """Whether a cell was measured in these cases, without a failure and, if ``quiet``, on an idle machine."""
        rows = self.rows_of(cell)
        is_complete = {row["case"] for row in rows} == {case.name for case in cases}
        return is_complete and all(row["failed"] is None and (is_quiet(row) or not quiet) for row in rows)

    def add(self, cell: Cell, rows: Sequence[Row]) -> None:
        """Set the rows of a cell, replacing earlier ones."""
        self._rows = [row for row in self._rows if not cell.has(row)] + list(rows)
        self.results.write(self._path)
