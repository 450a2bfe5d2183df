"""A setting comes from flag, environment, file or default, in this order, and ``config`` says from which."""

import errno
import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import basestation.cli
import device.cli
import export.cli
from common import settings_file
from common.setting import settings_of
from protocol.errors import BundleError, KeyFileError, SettingsError

APPS = {"device": device.cli.app, "basestation": basestation.cli.app, "export": export.cli.app}


class Program:
    """A command line with its environment and its files in folders of the test."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name = name
        self.user_file = folder / "user" / "edgedraft" / f"{name}.toml"
        self.system_file = folder / "system" / "edgedraft" / f"{name}.toml"
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(settings_file, "_SYSTEM_FOLDER", folder / "system")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "user"))
        monkeypatch.delenv(f"EDGEDRAFT_{name}_CONFIG".upper())

    def write(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def set(self, variable: str, value: str) -> None:
        self._monkeypatch.setenv(variable, value)

    def invoke(self, *arguments: str) -> Any:
        return CliRunner().invoke(APPS[self.name], arguments)

    def report(self, *flags: str) -> dict[str, Any]:
        result = self.invoke("config", *flags, "--json")
        assert result.exit_code == 0, (result.output, result.exception)
        report: dict[str, Any] = json.loads(result.output)
        return report

    def error(self, *arguments: str) -> str:
        error = self.invoke(*arguments).exception
        assert isinstance(error, SettingsError)
        return str(error)


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    return Program("device", tmp_path, monkeypatch)


@pytest.fixture
def station(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    return Program("basestation", tmp_path, monkeypatch)


# program, key, variable, and of flag, environment, file and default the value: as it is given, and as it is reported
TABLE: list[tuple[str, str, str, list[tuple[Any, Any]]]] = [
    ("device", "temperature", "EDGEDRAFT_DEVICE_TEMPERATURE", [("1", 1.0), ("2", 2.0), ("3", 3.0), ("", 0.0)]),
    ("device", "top-k", "EDGEDRAFT_DEVICE_TOP_K", [("1", 1), ("2", 2), ("3", 3), ("", 0)]),
    ("device", "seed", "EDGEDRAFT_DEVICE_SEED", [("1", 1), ("2", 2), ("3", 3), ("", None)]),
    ("device", "mode", "EDGEDRAFT_DEVICE_MODE", [("ids", "ids"), ("topk", "topk"), ("'full'", "full"), ("", "auto")]),
    ("device", "record", "EDGEDRAFT_DEVICE_RECORD", [("/a", "/a"), ("/b", "/b"), ("'/c'", "/c"), ("", None)]),
    ("device", "origins", "EDGEDRAFT_DEVICE_ORIGINS", [(None, True), ("0", False), ("true", True), ("", False)]),
    (
        "device",
        "cors-origin",
        "EDGEDRAFT_DEVICE_CORS_ORIGIN",
        [("a", ["a"]), ("b c", ["b", "c"]), ("['d', 'e']", ["d", "e"]), ("", [])],
    ),
    ("basestation", "window", "EDGEDRAFT_BASESTATION_WINDOW", [("1", 1), ("2", 2), ("3", 3), ("", 4)]),
    ("basestation", "target", "EDGEDRAFT_BASESTATION_TARGET", [("a", "a"), ("b", "b"), ("'c'", "c"), ("", None)]),
    (
        "basestation",
        "log-format",
        "EDGEDRAFT_BASESTATION_LOG_FORMAT",
        [("json", "json"), ("text", "text"), ("'json'", "json"), ("", "text")],
    ),
    (
        "export",
        "precision",
        "EDGEDRAFT_EXPORT_PRECISION",
        [("int8", "int8"), ("int4", "int4"), ("'fp32'", "fp32"), ("", "auto")],
    ),
]


@pytest.mark.parametrize(("name", "key", "variable", "values"), TABLE, ids=[row[1] for row in TABLE])
def test_the_first_of_flag_environment_file_and_default_gives_the_value(
    name: str,
    key: str,
    variable: str,
    values: list[tuple[Any, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources = ("flag", "environment", "file", "default")
    for given in product([True, False], repeat=3):
        with monkeypatch.context() as patched:
            program = Program(name, tmp_path, patched)
            flags = [f"--{key}", *([] if values[0][0] is None else [values[0][0]])] if given[0] else []
            if given[1]:
                program.set(variable, values[1][0])
            program.write(program.user_file, f"{key} = {values[2][0]}" if given[2] else "")
            first = (*given, True).index(True)
            expected = {"value": values[first][1], "source": sources[first]}
            assert program.report(*flags)["settings"][key] == expected, given


@pytest.mark.parametrize("name", APPS)
def test_every_setting_has_one_declaration_and_is_reported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program(name, tmp_path, monkeypatch)
    group: Any = typer.main.get_command(APPS[name])
    declared: dict[str, set[tuple[str, ...]]] = {}
    for command in group.commands.values():
        if command.name not in ("config", "keys"):
            for setting in settings_of(command):
                described = (str(setting.kind), str(setting.option.default), str(setting.option.help))
                declared.setdefault(setting.key, set()).add(described)
    assert [key for key, found in declared.items() if len(found) > 1] == []
    assert list(program.report()["settings"]) == list(declared)


def test_the_given_file_is_read_else_the_users_else_the_systems(board: Program, tmp_path: Path) -> None:
    assert board.report()["file"] is None
    files = [board.system_file, board.user_file, tmp_path / "variable.toml", tmp_path / "flag.toml"]
    for number, path in enumerate(files, 1):
        board.write(path, f"seed = {number}")
        if path.name == "variable.toml":
            board.set("EDGEDRAFT_DEVICE_CONFIG", str(path))
        flags = ["--config", str(path)] if path.name == "flag.toml" else []
        report = board.report(*flags)
        assert (report["file"], report["settings"]["seed"]) == (str(path), {"value": number, "source": "file"})


@pytest.mark.parametrize("which", ["user_file", "system_file"])
def test_a_file_that_cannot_be_looked_at_is_not_left_out(which: str, board: Program) -> None:
    path: Path = getattr(board, which)
    path.parent.parent.mkdir()
    path.parent.symlink_to(path.parent)
    if which == "user_file":
        board.write(board.system_file, "")
    message = board.error("config")
    assert message.startswith(f"the configuration file is '{path}'; allowed: a file in TOML (")
    assert "\n" not in message


def test_a_home_that_the_user_may_not_enter_has_no_file(
    board: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``ProtectHome=yes`` in a unit."""
    stat, home = Path.stat, tmp_path / "home"

    def refuse_home(path: Path, **options: Any) -> os.stat_result:
        if home in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, **options)

    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(Path, "stat", refuse_home)
    board.write(board.system_file, "seed = 5")
    assert board.report()["file"] == str(board.system_file)


@pytest.mark.parametrize(
    ("text", "name", "allowed"),
    [
        ("tempreature = 1", "a key in FILE is 'tempreature'", "temperature"),
        ("[serve]", "a key in FILE is 'serve'", "temperature"),
        ("prompt = 'hello'", "a key in FILE is 'prompt'", "temperature"),
        ("api-key = 'secret'", "a key in FILE is 'api-key'", "api-key-file"),
        ("top-k = '5'", "top-k in FILE is '5'", "an integer"),
        ("top-k = true", "top-k in FILE is True", "an integer"),
        ("top-p = 'half'", "top-p in FILE is 'half'", "a number"),
        ("origins = 1", "origins in FILE is 1", "true or false"),
        ("bind = 8080", "bind in FILE is 8080", "a text"),
        ("cors-origin = 'https://a'", "cors-origin in FILE is 'https://a'", "a list of texts"),
        ("retry-timeout = 0", "retry-timeout in FILE is 0", "greater than or equal to 1"),
        ("seed = ", "the configuration file is 'FILE'", "a file in TOML"),
        (None, "the configuration file is 'FILE'", "a file in TOML (No such file or directory)"),
    ],
)
@pytest.mark.parametrize("command", [["config"], ["generate", "--prompt", "a"]], ids=["config", "generate"])
def test_what_the_file_may_not_hold_is_named(
    command: list[str], text: str | None, name: str, allowed: str, board: Program, tmp_path: Path
) -> None:
    path = tmp_path / "device.toml"
    if text is not None:
        path.write_text(text)
    message, _, listed = board.error(*command, "--config", str(path)).partition("; allowed: ")
    assert message == name.replace("FILE", str(path))
    assert allowed in listed
    assert "\n" not in listed
    assert "secret" not in listed


def test_a_wrong_value_in_the_environment_names_its_variable(board: Program) -> None:
    board.set("EDGEDRAFT_DEVICE_TOP_K", "many")
    result = board.invoke("config")
    assert result.exit_code == 2
    assert "EDGEDRAFT_DEVICE_TOP_K" in result.output


def test_help_names_the_variables_that_are_set(board: Program) -> None:
    assert board.invoke("generate", "--help").output.count("env var") == 1  # of --config
    board.set("EDGEDRAFT_DEVICE_TOP_K", "4")
    assert board.invoke("generate", "--help").output.count("env var") == 2


def test_an_api_key_in_the_environment_precedes_the_file_that_the_configuration_names(board: Program) -> None:
    board.write(board.user_file, "api-key-file = '/nowhere'\nmode = 'ids'\nbundle = '/no/bundle'")
    assert isinstance(board.invoke("serve").exception, KeyFileError)
    board.set("EDGEDRAFT_API_KEY", "sesame")
    assert isinstance(board.invoke("serve", "--bind", "http://127.0.0.1:0").exception, BundleError)
    assert isinstance(board.invoke("serve", "--api-key-file", "/nowhere").exception, KeyFileError)


@pytest.mark.parametrize("key", ["key", "api-key-file"])
@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_a_secret_in_place_of_its_files_name_is_not_printed(key: str, source: str, board: Program) -> None:
    flags = [f"--{key}", "sesame"] if source == "flag" else []
    if source == "environment":
        board.set(f"EDGEDRAFT_DEVICE_{key.upper().replace('-', '_')}", "sesame")
    if source == "file":
        board.write(board.user_file, f"{key} = 'sesame'")
    assert board.report(*flags)["settings"][key]["source"] == source
    assert "sesame" not in board.invoke("config", *flags).output + json.dumps(board.report(*flags))


def test_the_api_key_is_not_printed(board: Program, tmp_path: Path) -> None:
    board.set("EDGEDRAFT_API_KEY", "sesame")
    path = board.write(tmp_path / "key", "sesame")
    board.write(board.user_file, f"api-key-file = '{path}'")
    assert board.report()["settings"]["api-key-file"] == {"value": str(path), "source": "file"}
    assert "sesame" not in board.invoke("config").output + json.dumps(board.report())


def test_config_prints_a_line_for_each_setting(station: Program) -> None:
    station.set("EDGEDRAFT_BASESTATION_TARGET", "/target")
    station.write(station.system_file, "drain-seconds = 9")
    lines = station.invoke("config", "--window", "2").output.splitlines()
    assert lines[0] == f"file: {station.system_file}"
    found = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert found["target"] == ["environment", "/target"]
    assert found["drain-seconds"] == ["file", "9.0"]
    assert found["window"] == ["flag", "2"]
    assert found["dtype"] == ["default", "auto"]
    assert found["keys"] == ["default"]


def test_a_setting_of_another_command_is_no_flag_of_this_one(board: Program) -> None:
    board.write(board.user_file, "bind = 'http://127.0.0.1:1'\nbundle = '/nowhere'")
    assert "'/nowhere' is not a bundle" in str(board.invoke("generate", "--prompt", "a").exception)
    assert board.invoke("generate", "--prompt", "a", "--bind", "http://127.0.0.1:1").exit_code == 2


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The standard folders of a bundle: the user's and the system's."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("device.options._SYSTEM_BUNDLE", tmp_path / "system")
    return tmp_path / "data" / "edgedraft" / "bundle", tmp_path / "system"


def test_the_bundle_is_the_users_or_else_the_systems(board: Program, homes: tuple[Path, Path]) -> None:
    user, system = homes
    for created, expected in ((None, user), (system, system), (user, user)):
        if created is not None:
            created.mkdir(parents=True)
        assert board.report()["settings"]["bundle"] == {"value": str(expected), "source": "default"}


def test_a_users_bundle_that_cannot_be_looked_at_is_not_replaced_by_the_systems(
    board: Program, homes: tuple[Path, Path]
) -> None:
    user, system = homes
    system.mkdir()
    user.parent.parent.mkdir()
    user.parent.symlink_to(user.parent)
    assert board.report()["settings"]["bundle"] == {"value": str(user), "source": "default"}
    assert f"'{user / 'manifest.json'}' cannot be read" in str(board.invoke("generate", "--prompt", "a").exception)


def test_where_no_bundle_is_the_error_says_how_to_make_one(board: Program, homes: tuple[Path, Path]) -> None:
    error = board.invoke("generate", "--prompt", "a").exception
    assert str(error) == (
        f"'{homes[0]}' is not a bundle: it has no manifest.json; "
        f"make one with: edgedraft-export convert MODEL {homes[0]}"
    )
