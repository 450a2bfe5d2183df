"""An error on the command line is reported in one line, and any text can be printed to any stdout."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from protocol.messages import PROTOCOL_VERSION
from tests.screen import ASCII_OUTPUTS

PACKAGES = ["device", "basestation", "bench", "export"]


def printed_by(package: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", package, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | (environment or {}),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_the_version_is_the_packages(package: str) -> None:
    expected = f"edgedraft-{package} {version('edgedraft')}, protocol version {PROTOCOL_VERSION}\n"
    assert printed_by(package, "--version") == expected


@pytest.mark.parametrize("arguments", [[package] for package in PACKAGES] + [["device", "chat"], ["bench", "report"]])
def test_h_is_help(arguments: list[str]) -> None:
    assert printed_by(*arguments, "-h") == printed_by(*arguments, "--help")
    assert "--help" in printed_by(*arguments, "-h")


COMPLETED = [("device", "gen", "generate"), ("basestation", "ser", "serve"), ("bench", "cap", "capacity")]
COMPLETED += [("export", "conv", "convert"), ("device", "generate --tem", "--temperature")]


@pytest.mark.parametrize(("package", "typed", "completed"), COMPLETED)
def test_a_shell_completes_commands_and_options(package: str, typed: str, completed: str) -> None:
    script = printed_by(
        package, "--show-completion", "bash", environment={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    )
    assert f"complete -o default -F _edgedraft_{package}_completion edgedraft-{package}" in script
    words = {"COMP_WORDS": f"edgedraft-{package} {typed}", "COMP_CWORD": str(len(typed.split()))}
    variables = {f"_EDGEDRAFT_{package.upper()}_COMPLETE": "complete_bash", **words}
    assert printed_by(package, environment=variables).split() == [completed]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(("arguments", "message"), [(["nope"], "No such command"), (["--nope"], "No such option")])
def test_an_unknown_command_or_option_is_one_line(package: str, arguments: list[str], message: str) -> None:
    assert message in line_of(package, *arguments)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["basestation", "serve"], "--target"),
        (["bench", "demo"], "--bundle"),
    ],
)
def test_a_missing_option_is_named(arguments: list[str], option: str) -> None:
    assert f"Missing option '{option}'" in line_of(*arguments)


def line_of(package: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", package, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


PRINT = r"""
import sys
from {package}.cli import app, main

@app.command()
def echo():
    sys.stdout.write(ascii(sys.stdin.readline()) + " \U0001F642\n")

sys.argv = ["{package}", "echo"]
main()
"""


@pytest.mark.parametrize("environment", ASCII_OUTPUTS)
@pytest.mark.parametrize("package", ["device", "basestation", "export"])
def test_characters_that_stdout_lacks_and_bytes_that_are_not_text_pass(
    package: str, environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINT.format(package=package)],
        input=b"a\xff\n",
        capture_output=True,
        env=os.environ | environment,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"'a\\udcff\\n' ?\n", b"")


@pytest.mark.parametrize("environment", ASCII_OUTPUTS)
def test_a_report_is_printed_to_an_ascii_stdout(environment: dict[str, str], tmp_path: Path) -> None:
    folder = "r\N{LATIN SMALL LETTER E WITH ACUTE}sultats"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "report", "--results", str(tmp_path), "--docs", str(tmp_path / folder)],
        capture_output=True,
        env=os.environ | environment,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"sultats/results.md" in done.stdout.replace(b"\n", b"")
    assert done.stdout.isascii()


@pytest.mark.parametrize("environment", ASCII_OUTPUTS)
@pytest.mark.parametrize(
    "arguments", [["device", "--help"], ["basestation", "serve", "--help"], ["bench", "demo", "--help"]]
)
def test_help_is_printed_to_an_ascii_stdout(arguments: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, env=os.environ | environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()


@pytest.mark.parametrize("arguments", [["--help"], ["keys", "list", "{keys}"], ["keys", "list", "{keys}", "--json"]])
def test_a_full_disk_is_one_line_and_a_closed_pipe_is_silent(arguments: list[str], tmp_path: Path) -> None:
    keys = str(tmp_path / "keys")
    module = [sys.executable, "-m", "basestation"]
    subprocess.run([*module, "keys", "new", keys], check=True, capture_output=True)
    command = [*module, *(argument.format(keys=keys) for argument in arguments)]
    reading, writing = os.pipe()
    os.close(reading)
    with Path("/dev/full").open("wb") as full, os.fdopen(writing, "wb") as closed:
        outputs = (full, closed)
        done = [subprocess.run(command, stdout=one, stderr=subprocess.PIPE, text=True, check=False) for one in outputs]
    assert [one.returncode for one in done] == [1, 1]
    assert [one.stderr for one in done] == ["error: [Errno 28] No space left on device\n", ""]


@pytest.mark.parametrize(
    "option",
    [
        "--max-prompt-len=0",
        "--max-draft-len=99999999999999999999",
        "--window=-1",
        "--idle-timeout=nan",
        "--drain-seconds=nan",
        "--drain-seconds=inf",
        "--drain-seconds=-1",
    ],
)
def test_a_number_that_a_base_station_does_not_allow_is_one_line(option: str) -> None:
    line = line_of("basestation", "serve", "--target", "unused", "--bind", "tcp://127.0.0.1:0", option)
    assert option.partition("=")[0] in line
