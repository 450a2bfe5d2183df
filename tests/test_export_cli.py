"""A user's mistake gives one line on stderr and an exit code."""

import sys
from pathlib import Path

import pytest
import typer

from common.command_line import run
from export.cli import app


def exit_code_of(monkeypatch: pytest.MonkeyPatch, command: typer.Typer, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["edgedraft-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        run(command, "export")
    return int(exit_info.value.code or 0)


@pytest.mark.parametrize(
    ("options", "words", "exit_code"),
    [
        (["--converter", "magic"], ["--converter", "magic", "optimum"], 2),
        (["--precision", "int3"], ["--precision", "int3", "int4"], 2),
        ([], ["contains no config.json"], 1),
    ],
)
def test_an_error_is_one_line(
    options: list[str],
    words: list[str],
    exit_code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert exit_code_of(monkeypatch, app, "convert", tmp_path, tmp_path / "bundle", *options) == exit_code
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert all(word in errors for word in words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "DIR", "--model", "qwen-7b"], ["--model", "qwen-7b", "qwen2.5-coder-0.5b"]),
        (["convert", "MODEL", "DIR", "--draft-ms", "int5=3"], ["draft-ms", "int5=3", "int8-block128"]),
        (["convert", "MODEL", "DIR", "--rtt-ms=-1"], ["--rtt-ms"]),
        (["convert", "MODEL", "OTHER", "DIR"], ["MODEL OTHER", "several with --target"]),
        (["inspect", "DIR"], ["is not a bundle"]),
        (["verify", "DIR"], ["is not a bundle"]),
    ],
)
def test_a_value_that_is_not_allowed_is_one_line(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    placed = [str(tmp_path / "none") if argument == "DIR" else argument for argument in arguments]
    assert exit_code_of(monkeypatch, app, *placed) != 0
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert all(word in errors for word in words)
    assert not list(tmp_path.iterdir())


def test_interrupting_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    interrupted = typer.Typer()

    @interrupted.command()
    def wait() -> None:
        raise KeyboardInterrupt

    assert exit_code_of(monkeypatch, interrupted) == 130
    assert capfd.readouterr() == ("", "interrupted\n")
