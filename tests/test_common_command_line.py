"""What a user does wrong on the command line is one line."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("room", ["device", "basestation", "bench", "export"])
@pytest.mark.parametrize(("arguments", "told"), [(["nope"], "No such command"), (["--nope"], "No such option")])
def test_a_wrong_word_is_one_line(room: str, arguments: list[str], told: str) -> None:
    assert told in line_of(room, *arguments)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["device", "generate", "--prompt", "hi", "--server", "tcp://127.0.0.1:1"], "--bundle"),
        (["basestation", "serve"], "--target"),
        (["bench", "demo"], "--bundle"),
    ],
)
def test_an_option_that_is_missing_is_named(arguments: list[str], option: str) -> None:
    assert f"Missing option '{option}'" in line_of(*arguments)


def line_of(room: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", room, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr
