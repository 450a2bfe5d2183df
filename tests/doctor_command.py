"""``doctor`` of either end, run in this process; its JSON output by check."""

import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import typer

from common.checks import Check, Status
from common.command_line import run


@dataclass(frozen=True)
class Report:
    """What ``doctor --json`` printed, and its exit code."""

    exit_code: int
    checks: dict[str, Check]
    prediction: dict[str, Any] | None

    def status(self, name: str) -> Status:
        return self.checks[name].status

    def failures(self) -> list[str]:
        return [name for name, check in self.checks.items() if check.status is Status.FAILED]

    def failure(self, name: str) -> str:
        """Finding and remedy of the one check that failed; those that need it say so."""
        assert self.failures() == [name], self.checks
        assert self.exit_code == 1
        check = self.checks[name]
        assert check.remedy
        return f"{check.finding}; {check.remedy}"

    def not_checked(self, cause: str) -> list[str]:
        """The checks that were not made because of another."""
        return [name for name, check in self.checks.items() if check.finding == f"it needs {cause!r}"]


class DoctorCommand:
    """Runs ``doctor`` of one command line."""

    def __init__(self, app: typer.Typer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._app = app
        self._monkeypatch = monkeypatch
        self._capfd = capfd

    def output(self, *options: object) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        self._monkeypatch.setattr(sys, "argv", ["edgedraft", "doctor", *map(str, options)])
        with pytest.raises(SystemExit) as exit_info:
            run(self._app, "x")
        return int(exit_info.value.code or 0), *self._capfd.readouterr()

    def report(self, *options: object) -> Report:
        code, output, errors = self.output("--json", *options)
        assert errors == ""
        printed = json.loads(output)
        checks = [Check(**{**check, "status": Status(check["status"])}) for check in printed["checks"]]
        return Report(code, {check.name: check for check in checks}, printed.get("prediction"))
