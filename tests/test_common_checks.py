"""The checks of ``doctor``: what fails, what is not made because of it, and what is printed."""

import io

from rich.console import Console

from common.checks import Check, Checks, Finding, Status
from protocol.errors import LinkError


def fail(*_: object) -> Finding[int]:
    raise LinkError("nobody is there; knock again")


def test_an_error_is_a_failure_with_its_remedy() -> None:
    checks = Checks(None)
    outcome = checks.run("door", fail)
    assert (outcome.value, outcome.cause, checks.failed) == (None, "door", True)
    assert checks.results == [Check("door", Status.FAILED, "nobody is there", "knock again")]


def test_a_check_gets_the_values_it_needs() -> None:
    checks = Checks(None)
    two, three = (checks.run(str(value), lambda value=value: Finding("", value)) for value in (2, 3))
    assert checks.run("product", lambda one, other: Finding("", one * other), two, three).value == 6
    assert not checks.failed


def test_what_depends_on_a_failure_names_the_first_cause() -> None:
    checks = Checks(None)
    door = checks.run("door", fail)
    room = checks.run("room", lambda _: Finding("", 1), door)
    checks.run("table", lambda _: Finding("", 1), room)
    checks.run("garden", lambda: Finding("", 1))
    statuses = [(check.status, check.finding) for check in checks.results[1:]]
    assert statuses == [(Status.NOT_CHECKED, "it needs 'door'")] * 2 + [(Status.OK, "")]


def test_warnings_stop_nothing_and_fail_nothing() -> None:
    checks = Checks(None)
    door = checks.run("door", lambda: Finding("it creaks", 1, Status.WARNING, "oil it"))
    assert checks.run("room", lambda value: Finding("", value), door).value == 1
    assert not checks.failed


def test_each_check_is_one_line_however_long() -> None:
    text = io.StringIO()
    checks = Checks(Console(file=text, width=40, soft_wrap=True))
    checks.run("door", lambda: Finding("[red]creaks[/red] " + "x" * 100, None, Status.WARNING, "oil it"))
    assert text.getvalue() == f"warning      door          [red]creaks[/red] {'x' * 100}; oil it\n"
