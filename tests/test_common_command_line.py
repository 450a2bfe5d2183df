"""A usage error on the command line is reported in one line."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["device", "basestation", "bench", "export"])
@pytest.mark.parametrize(("arguments", "message"), [(["nope"], "No such command"), (["--nope"], "No such option")])
def test_an_unknown_command_or_option_is_one_line(package: str, arguments: list[str], message: str) -> None:
    assert message in line_of(package, *arguments)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["device", "generate", "--prompt", "hi", "--server", "tcp://127.0.0.1:1"], "--bundle"),
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
