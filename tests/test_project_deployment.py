"""``compose.yaml`` and ``flash.sh`` set options by environment or file, and the programs accept what they set."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import basestation.cli
import device.cli
from tests.sample import PROJECT

APPS = {"device": device.cli.app, "basestation": basestation.cli.app}
SERVICES = yaml.safe_load((PROJECT / "docker" / "compose.yaml").read_text(encoding="utf-8"))["services"]
BOARD = """#!/bin/sh
# stands in for ssh to a board that nothing was installed on yet
case "$*" in
  *docker*info*) exit $NO_DOCKER ;;
  *uname*) echo aarch64 ;;
  *) exit 1 ;;
esac
"""


def settings_of(program: str, *flags: str) -> dict[str, Any]:
    result = CliRunner().invoke(APPS[program], ["config", *flags, "--json"])
    assert result.exit_code == 0, result.exception
    settings: dict[str, Any] = json.loads(result.output)["settings"]
    return settings


@pytest.mark.parametrize("name", ["device", "basestation"])
def test_compose_sets_options_by_environment(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    environment = SERVICES[name]["environment"]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    found = settings_of(name)
    variables = {
        f"EDGEDRAFT_{name}_{key}".upper().replace("-", "_"): value
        for key, value in found.items()
        if value["source"] == "environment"
    }
    assert set(variables) == set(environment)
    assert SERVICES[name]["command"] in ("serve ${DEVICE_OPTIONS-}", "serve ${STATION_OPTIONS-}")


def flashed(folder: Path, has_docker: bool) -> tuple[str, str]:
    """The configuration and the unit that ``flash.sh`` would write on a board."""
    (folder / "ssh").write_text(BOARD)
    (folder / "ssh").chmod(0o755)
    (folder / "manifest.json").touch()
    options = ["--server", "tcp://10.0.0.1:5755", "--keys", "keys", "--bundle", str(folder), "--port", "9000"]
    done = subprocess.run(
        [str(PROJECT / "docker" / "flash.sh"), "--dry-run", *options, "board"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "NO_DOCKER": "01"[not has_docker]},
    )
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("    | ") for line in done.stdout.splitlines() if line.startswith("    | ")]
    split = lines.index("[Unit]")
    return "\n".join(lines[:split]), "\n".join(lines[split:])


@pytest.mark.parametrize("has_docker", [False, True])
def test_flash_sets_options_in_a_file_that_the_device_accepts(has_docker: bool, tmp_path: Path) -> None:
    configuration, unit = flashed(tmp_path, has_docker)
    path = tmp_path / "device.toml"
    path.write_text(configuration)
    found = settings_of("device", "--config", str(path))
    given = {key: setting["value"] for key, setting in found.items() if setting["source"] == "file"}
    state = "" if has_docker else "/var/lib/edgedraft"
    assert given["bundle"] == f"{state}/bundle"
    assert given["server"] == "tcp://10.0.0.1:5755"
    assert given["station-key"] == f"{state}/keys/station.pub"
    assert given["provider"] == "CPUExecutionProvider"
    assert given["bind"] == ("http://0.0.0.0:8080" if has_docker else "http://127.0.0.1:9000")
    assert {"key", "api-key-file"} <= set(given)
    command = unit.partition("ExecStart=")[2].partition("\nExecStop")[0].partition("\nNoNew")[0]
    assert command.endswith(" serve")
    assert (":/etc/edgedraft/device.toml:ro" in command) == has_docker


def test_an_image_is_built_with_the_files_of_its_page() -> None:
    kept = {line.removeprefix("!") for line in (PROJECT / ".dockerignore").read_text().splitlines()}
    for package in ("device", "basestation"):
        folders = {path.parent for path in (PROJECT / package).rglob("*") if path.suffix in (".html", ".css", ".js")}
        assert folders == {PROJECT / package / "page"}
        assert f"{package}/page/*" in kept
