"""The command line of the benchmarks, which imports only what a command needs."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from bench.cli import MODULES, app, summary
from bench.setup.environment import flags_alone

WITHOUT_NUMBERS = ("demo", "theory", "link", "report")
HEAVY = ("torch", "transformers", "scipy", "matplotlib", "onnxruntime")
PRINT_IMPORTED = f"""
import json, sys
from typer.testing import CliRunner
from bench.cli import app
result = CliRunner().invoke(app, ARGUMENTS)
print(json.dumps([result.exit_code, result.output, [name for name in {HEAVY} if name in sys.modules]]))
"""


def run_fresh(*arguments: str) -> tuple[int, str, list[str]]:
    """Exit code, output and imported heavy packages of a command line in a fresh interpreter."""
    code = PRINT_IMPORTED.replace("ARGUMENTS", repr(arguments))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    exit_code, output, imported = json.loads(done.stdout)
    return exit_code, output, imported


def test_help_lists_every_command_without_importing_it() -> None:
    exit_code, output, imported = run_fresh("--help")
    assert exit_code == 0
    assert imported == []
    listed = [line.split()[1] for line in output.partition("Commands")[2].splitlines() if line.startswith("│ ")]
    assert [name for name in listed if name in MODULES] == list(MODULES)
    for name in MODULES:
        assert summary(name).endswith(".")
        assert summary(name).split()[0] in output


def test_completion_lists_every_command_without_importing_it() -> None:
    code = """
import sys
from bench.cli import main
try: main()
finally: print([name for name in HEAVY if name in sys.modules])
""".replace("HEAVY", repr(HEAVY))
    words = {"COMP_WORDS": "edgedraft-bench ", "COMP_CWORD": "1", "_EDGEDRAFT_BENCH_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | words, check=True
    )
    assert done.stdout.split() == [*MODULES, "[]"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("relay", []), ("link", []), ("churn", []), ("report", ["matplotlib"]), ("theory", ["scipy"])],
)
def test_a_command_imports_only_what_it_needs(name: str, expected: list[str]) -> None:
    assert run_fresh(name, "--help")[2] == expected


@pytest.mark.parametrize("name", MODULES)
def test_every_command_shows_its_options(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert summary(name).split()[0] in result.output
    assert "--help" in result.output
    assert f"{name} [OPTIONS]" in result.output


def test_a_misspelt_command_suggests_a_name() -> None:
    result = CliRunner().invoke(app, ["capcity"])
    assert result.exit_code == 2
    assert "capacity" in result.output


def test_the_processes_of_a_benchmark_have_no_settings_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGEDRAFT_BASESTATION_CONFIG")
    monkeypatch.setenv("EDGEDRAFT_BASESTATION_BIND", "tcp://127.0.0.1:1")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "edgedraft").mkdir()
    (tmp_path / "edgedraft" / "basestation.toml").write_text('metrics-bind = "9464"\n')
    command = [sys.executable, "-m", "basestation", "config", "--json"]
    sources = [
        {setting["source"] for setting in json.loads(subprocess.check_output(command, env=env))["settings"].values()}
        for env in (None, flags_alone())
    ]
    assert sources == [{"environment", "file", "default"}, {"default"}]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["cluster", "--seconds", "-1"], "--seconds"),
        (["cluster", "--devices", "0"], "--devices"),
        (["masks", "--tokenizer", "missing.json"], "missing.json"),
        (["masks", "--tokenizer", os.devnull], os.devnull),
        (["masks", "--tokenizer", "missing.json", "--rows", "0"], "--rows"),
        (["exact", "--bundle", ".", "--target", ".", "--count", "0"], "--count"),
    ],
)
def test_a_setting_out_of_range_or_a_wrong_file_is_named_in_one_line(arguments: list[str], named: str) -> None:
    command = [sys.executable, "-m", "bench", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert named in ended.stderr
    assert ended.stderr.count("\n") == 1


def numeric_options(name: str) -> Iterator[tuple[str, float | None]]:
    """Each option of a command that takes a number, and its lower bound."""
    function = getattr(import_module(MODULES[name]), name)
    for parameter, hint in get_type_hints(function, include_extras=True).items():
        kind, *metadata = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if metadata and re.search(r"\b(int|float)\b", str(kind)):
            option, named = metadata[0], f"--{parameter.replace('_', '-')}"
            # Beside a type, the first positional argument of ``typer.Option`` is a name.
            yield (option.default if isinstance(option.default, str) else named), option.min


@pytest.mark.parametrize("name", [name for name in MODULES if name not in WITHOUT_NUMBERS])
def test_a_number_out_of_range_names_its_option(name: str) -> None:
    options = [*numeric_options(name)]
    assert options
    for option, least in options:
        assert least is not None, f"{option} has no bound"
        with pytest.raises(typer.BadParameter) as refused:
            get_command(app)([name, option, str(least - 1)], standalone_mode=False)
        assert f"'{option}'" in refused.value.format_message()
