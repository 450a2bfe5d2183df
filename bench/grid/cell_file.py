"""The results of a grid as they grow, a cell at a time; what is there already is not measured again."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.grid.cells import Cell
from bench.grid.summary import is_quiet
from bench.setup.results import Results, Row, Value
from protocol.errors import SettingsError


class CellFile:
    """Rows by cell, written whenever a cell is added.

    Args:
        path: of the JSON file; None keeps them in memory alone.
        settings: what all cells are measured with.

    Raises:
        SettingsError: the file holds something else, or was measured with other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Value]) -> None:
        self._path = path
        self._settings = settings
        self._rows: list[Row] = []
        if path is not None and path.exists():
            before = Results.read(path)
            if before.settings != settings:
                raise SettingsError("json", str(path), f"a new file, or one measured with {dict(settings)}")
            self._rows = [dict(row) for row in before.rows]

    @property
    def results(self) -> Results:
        """All rows so far."""
        return Results(self._settings, self._rows)

    def rows_of(self, cell: Cell) -> list[Row]:
        """The rows of a cell, if it was measured."""
        return [row for row in self._rows if _is_of(row, cell)]

    def is_done(self, cell: Cell, quiet: bool = False) -> bool:
        """Whether a cell was measured and nothing in it failed; if ``quiet`` counts, on a quiet machine."""
        rows = self.rows_of(cell)
        return bool(rows) and all(row["failed"] is None and (is_quiet(row) or not quiet) for row in rows)

    def add(self, cell: Cell, rows: Sequence[Row]) -> None:
        """Keep the rows of a cell, in place of those it had."""
        self._rows = [row for row in self._rows if not _is_of(row, cell)] + list(rows)
        self.results.write(self._path)


def _is_of(row: Mapping[str, Value], cell: Cell) -> bool:
    columns = cell.columns()
    return {name: row[name] for name in columns} == columns
