"""The checks of ``doctor``: one after the other, a line for each, and an exit code.

Knows findings and how they depend on each other; not what is checked.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.text import Text

from protocol.errors import EdgedraftError

Value = TypeVar("Value")


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    NOT_CHECKED = "not checked"


_STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "bold red", Status.NOT_CHECKED: "dim"}
_NAME_WIDTH = 12


@dataclass(frozen=True)
class Finding(Generic[Value]):
    """What a check found.

    Attributes:
        text: one line for the user.
        value: for the checks that depend on this one.
        status: ``FAILED`` and ``NOT_CHECKED`` stop those checks.
        remedy: what to do; empty if nothing.
    """

    text: str
    value: Value
    status: Status = Status.OK
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """The result of a check; the field names are those of ``doctor --json``."""

    name: str
    status: Status
    finding: str
    remedy: str


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """A check that was made, for those that depend on it.

    Attributes:
        value: of its finding; None if it failed or was not made.
        cause: the name of the check that failed, this one or one that it depends on; empty if none did.
    """

    value: Value | None
    cause: str


class Checks:
    """Makes checks, and keeps their results.

    Args:
        console: gets a line for each; None prints nothing.

    Attributes:
        results: so far.
    """

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self.results: list[Check] = []

    @property
    def failed(self) -> bool:
        """Whether any check failed."""
        return any(check.status is Status.FAILED for check in self.results)

    def run(self, name: str, examine: Callable[..., Finding[Value]], *needed: Outcome[Any]) -> Outcome[Value]:
        """Make a check, unless one that it needs has no value.

        Args:
            name: of the check.
            examine: takes the values of ``needed``; an ``EdgedraftError`` that it raises is the check's failure.
            needed: the checks that it depends on.
        """
        if cause := next((one.cause for one in needed if one.cause), ""):
            return self._add(name, Finding(f"it needs {cause!r}", None, Status.NOT_CHECKED), cause)
        try:
            with self._busy(name):
                found = examine(*(one.value for one in needed))
        except EdgedraftError as error:
            text, _, remedy = str(error).rpartition("; ")
            return self._add(name, Finding(text or remedy, None, Status.FAILED, remedy if text else ""), name)
        return self._add(name, found, name if found.status in (Status.FAILED, Status.NOT_CHECKED) else "")

    def _add(self, name: str, found: "Finding[Any]", cause: str) -> Outcome[Any]:
        check = Check(name, found.status, found.text, found.remedy)
        self.results.append(check)
        if self._console:
            self._console.print(_line(check))
        return Outcome(None if cause else found.value, cause)

    @contextmanager
    def _busy(self, name: str) -> Iterator[None]:
        """Show on a terminal what is being checked."""
        if self._console is None:
            yield
            return
        with self._console.status(name):
            yield


def _line(check: Check) -> Text:
    line = Text(f"{check.status:11}", style=_STYLES[check.status])
    line.append(f"  {check.name:{_NAME_WIDTH}}  ", style="bold")
    line.append(check.finding, style="default")
    if check.remedy:
        line.append(f"; {check.remedy}", style="default")
    return line
