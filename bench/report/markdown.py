"""Tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from bench.setup.results import Value, format_value

Rows: TypeAlias = Sequence[Mapping[str, Value]]


def by_case(rows: Rows) -> dict[str, list[Mapping[str, Value]]]:
    """The rows of each case, in order of appearance."""
    found: dict[str, list[Mapping[str, Value]]] = {}
    for row in rows:
        found.setdefault(str(row["case"]), []).append(row)
    return found


def table(rows: Rows, leave_out: Sequence[str] = ()) -> str:
    """A table with a line per row and a column per name of the first row."""
    names = [name for name in rows[0] if name not in leave_out]
    head = [name.replace("_", " ") for name in names]
    return lines([head, *([format_value(row[name]) for name in names] for row in rows)])


def lines(cells_of_lines: Sequence[Sequence[str]]) -> str:
    """A table from its lines, the head first."""
    head, *rest = (f"| {' | '.join(line)} |" for line in cells_of_lines)
    return "\n".join([head, "|---" * len(cells_of_lines[0]) + "|", *rest])
