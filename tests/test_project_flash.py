"""``docker/flash.sh`` says what is wrong before it changes anything, and sets options that the device accepts."""

import subprocess
from pathlib import Path

import pytest

from basestation.devices.key_folder import KeyFolder
from device.link.curve_keys import new_key
from tests.command_settings import settings_of
from tests.stub_board import StubBoard


def flashed(folder: Path, has_docker: bool, *options: str, **environment: str) -> tuple[str, str]:
    """The configuration and the unit that ``flash.sh`` would write on a board."""
    done = StubBoard.create(folder, has_docker).flash("--dry-run", "--port", "9000", *options, **environment)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("    | ") for line in done.stdout.splitlines() if line.startswith("    | ")]
    text = "\n".join(lines)
    configuration = text[text.index("bundle = ") : text.index("[Unit]")]
    return configuration, text[text.index("[Unit]") :]


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
    assert " serve\n" in unit.partition("ExecStart=")[2]
    assert (":/etc/edgedraft/device.toml:ro" in unit) == has_docker
    assert "LogRateLimitBurst=" in unit
    assert ("--log-opt max-size=5m --log-opt max-file=2" in unit) == has_docker


def test_a_container_with_a_gpu_gets_the_groups_of_its_devices(tmp_path: Path) -> None:
    _, unit = flashed(
        tmp_path,
        True,
        *("--image-name", "device-jetson", "--provider", "CUDAExecutionProvider", "--image", "registry.example/jetson"),
        RUNTIME="nvidia",
    )
    assert "--runtime nvidia --group-add 44 --group-add 104 " in unit


@pytest.mark.parametrize("has_docker", [False, True])
def test_systemd_accepts_the_units_of_a_board(has_docker: bool, tmp_path: Path) -> None:
    _, unit = flashed(tmp_path, has_docker)
    path = tmp_path / "edgedraft-device.service"
    path.write_text(unit.replace("/var/lib/edgedraft/venv/bin/edgedraft-device", "/usr/bin/env"))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for line in ("ProtectSystem=strict", "NoNewPrivileges=yes", "StateDirectory=edgedraft"):
        assert line in unit


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SSH_SAYS": "ssh: connect to host board port 22: No route to host"}, "board is unreachable"),
        ({"SSH_SAYS": "pi@board: Permission denied (publickey,password)."}, "run: ssh-copy-id board"),
        ({"SSH_SAYS": "Host key verification failed."}, "run: ssh board"),
        ({"SUDO_SAYS": "sudo: a password is required"}, "cannot use sudo without a password"),
        ({"DOCKER_EXIT": "1"}, "docker on board does not answer"),
        ({"MACHINE": "armv7l"}, "no image for armv7l"),
    ],
)
def test_a_board_that_cannot_be_used_is_one_line(environment: dict[str, str], words: str, tmp_path: Path) -> None:
    done = StubBoard.create(tmp_path).flash("--dry-run", **environment)
    assert_error(done, words)


@pytest.mark.parametrize(
    ("has_docker", "options", "environment", "words"),
    [
        (False, [], {"PYTHON_EXIT": "1"}, "neither docker nor Python 3.11"),
        (False, ["--provider", "CUDAExecutionProvider"], {}, "needs docker on the board"),
        (False, ["--image", "registry.example/device"], {}, "--image needs docker"),
        (True, ["--provider", "CUDAExecutionProvider"], {}, "needs --image-name device-jetson"),
        (True, ["--provider", "ROCMExecutionProvider"], {}, "--provider is 'ROCMExecutionProvider'; allowed: CPU"),
        (True, ["--image-name", "device-jetson"], {"MACHINE": "x86_64"}, "is for arm64; board is amd64"),
        (
            True,
            ["--image-name", "device-jetson", "--provider", "TensorrtExecutionProvider", "--image", "a/b"],
            {},
            "no runtime nvidia",
        ),
        (True, ["--image", "registry.example/device"], {"MANIFEST_EXIT": "1"}, "neither a file here nor an image"),
        (True, ["--image", "device.tar"], {}, "device.tar is not a file"),
        (True, ["--keys", "/nowhere"], {}, "the base station's keys cannot be read"),
        (True, ["--station-command", "false"], {}, "the base station's keys cannot be read"),
        (True, ["--image-name", "device-jetson"], {}, "ONNXRUNTIME is missing"),
        (True, [], {"BINFMT": "/nowhere"}, "apt-get install qemu-user-static binfmt-support"),
    ],
)
def test_a_dry_run_fails_where_the_real_run_would(
    has_docker: bool, options: list[str], environment: dict[str, str], words: str, tmp_path: Path
) -> None:
    done = StubBoard.create(tmp_path, has_docker).flash("--dry-run", *options, **environment)
    assert_error(done, words)


def test_a_name_that_another_device_has_is_refused(tmp_path: Path) -> None:
    board = StubBoard.create(tmp_path)
    KeyFolder(tmp_path / "keys").enroll("kitchen", new_key(tmp_path / "other"))
    assert_error(board.flash("--dry-run"), "--name is 'kitchen'")
    assert board.flash("--dry-run", "--name", "kitchen-2").returncode == 0


def test_a_board_is_enrolled_by_any_command_that_reaches_the_keys(tmp_path: Path) -> None:
    """As ``docker compose exec -T basestation edgedraft-basestation``, with the folder that the container has."""
    exec_ = tmp_path / "compose"
    exec_.write_text(f'#!/bin/sh\ncd {tmp_path}\n[ "$1 $2" = "exec station" ] || exit 1\nshift 2\nexec "$@"\n')
    exec_.chmod(0o755)
    command = f"{exec_} exec station edgedraft-basestation"
    done = StubBoard.create(tmp_path).flash("--dry-run", "--station-command", command, "--keys", "keys")
    assert done.returncode == 0, done.stderr
    assert f"here: {command} keys enroll keys kitchen KEY" in done.stdout
    assert (tmp_path / "keys" / "station.pub").read_text() in done.stdout.replace("    | ", "")


def assert_error(done: "subprocess.CompletedProcess[str]", words: str) -> None:
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
