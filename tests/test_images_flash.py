"""``docker/flash.sh`` over a real sshd, whose chroot stands in for a board without docker."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from basestation.devices.key_folder import KeyFolder
from bench.setup.station_process import free_port, running_station
from device.link.curve_keys import new_key
from tests.sample import BUNDLE, DOCKER, PROJECT, SAMPLE

pytestmark = pytest.mark.images

_SYSTEMCTL = """#!/bin/sh
# a minimal systemctl: restart runs the unit's ExecStart as its User
unit=/etc/systemd/system/edgedraft-device.service
echo "$@" >> /run/systemctl.log
[ "$1" = restart ] || exit 0
[ ! -e /run/pid ] || kill "$(cat /run/pid)" || true
user=$(sed -n 's/^User=//p' $unit)
setpriv --reuid "$user" --regid "$user" --clear-groups $(sed -n 's/^ExecStart=//p' $unit) >/run/log 2>&1 </dev/null &
echo $! > /run/pid
"""
_DOCKER = r"""#!/bin/sh
# a minimal docker: a file for each tag; the container is healthy if its image is good, and ready if it is not alone
images=/run/images unit=/etc/systemd/system/edgedraft-device.service
mkdir -p $images
echo "$@" >> /run/docker.log
case "$*" in
  load*)
    cat > $images/loaded
    ! grep broken $images/loaded >&2 || exit 1
    grep -q unnamed $images/loaded && echo "Loaded image ID: sha256:1" || echo "Loaded image: localhost/loaded" ;;
  tag*) cp "$images/${2##*/}" "$images/${3##*/}" ;;
  exec*healthz*) grep -q good "$images/$(sed -n 's|.* localhost/\(.*\) serve$|\1|p' $unit)" ;;
  exec*readyz*) ! grep -q alone "$images/$(sed -n 's|.* localhost/\(.*\) serve$|\1|p' $unit)" ;;
esac
"""
_SSHD = 'mount --bind /proc "$1/proc"; mount --bind /dev "$1/dev"; exec /usr/sbin/sshd -D -e -f "$2"'
"""In a mount namespace, so that the mounts disappear with the process."""


@dataclass(frozen=True)
class Board:
    """A root folder behind an sshd on loopback; the ``ssh`` in folder ``path`` connects to it."""

    root: Path
    path: Path

    def flash(self, *options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        path = f"{self.path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, **environment}
        command = [str(DOCKER / "flash.sh"), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=500)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    tmp_path.chmod(0o755)
    root, keys, port = tmp_path / "board", tmp_path / "ssh", free_port()
    for folder in (root, keys):
        folder.mkdir()
    subprocess.run(["tar", "-xf", PROJECT / "build/images/base-amd64.tar", "-C", root], check=True)
    root.chmod(0o755)
    shutil.copytree(PROJECT / "build/images/wheels/device-amd64", root / "wheels")
    (root / "etc/pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    systemctl = root / "usr/bin/systemctl"
    systemctl.write_text(_SYSTEMCTL)
    systemctl.chmod(0o755)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
    shutil.copy(keys / "user.pub", keys / "authorized_keys")
    (keys / "sshd").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {keys}/host\nAuthorizedKeysFile {keys}/authorized_keys\n"
        f'ForceCommand exec chroot {root} /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n'
        "PidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
    )
    ssh = keys / "ssh"
    ssh.write_text(
        f"#!/bin/sh\nexec /usr/bin/ssh -F none -p {port} -i {keys}/user -o StrictHostKeyChecking=no "
        f'-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o HostName=127.0.0.1 "$@"\n'
    )
    ssh.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    command = ["unshare", "--mount", "sh", "-ec", _SSHD, "sh", str(root), str(keys / "sshd")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as sshd:
        try:
            while subprocess.run([ssh, "root@board", "true"], check=False).returncode:
                assert sshd.poll() is None
                time.sleep(0.1)
            yield Board(root, keys)
        finally:
            pid = root / "run/pid"
            if pid.exists():
                subprocess.run(["kill", pid.read_text().strip()], check=False)
            sshd.terminate()


def state_of(root: Path) -> dict[str, bytes]:
    """The files that flashing writes on a board, without the environment."""
    folders = [root / "var/lib/edgedraft" / name for name in ("keys", "bundle")]
    found = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    files = [
        path
        for path in (*found, *root.glob("etc/systemd/system/edgedraft*"), *root.glob("etc/edgedraft/*"))
        if path.is_file()
    ]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_a_board_is_ready_after_one_run_unchanged_by_a_second_and_rolled_back_by_a_bad_one(
    board: Board, tmp_path: Path
) -> None:
    keys, port = tmp_path / "station-keys", free_port()
    basestation = [sys.executable, "-m", "basestation", "keys"]
    subprocess.run([*basestation, "new", str(keys)], check=True, capture_output=True)
    with running_station(str(SAMPLE), "float32", "--keys", str(keys)) as address:
        options = ["--server", address, "--keys", str(keys), "--bundle", str(BUNDLE), "--name", "kitchen"]
        options += ["--port", str(port), "root@board"]

        shown = board.flash("--dry-run", *options)
        assert shown.returncode == 0, shown.stderr
        steps = (
            "create an environment",
            "copy the bundle",
            "create the board's key",
            "enroll",
            "configuration",
            "unit",
            "start",
            "ready",
        )
        assert [step for step in steps if step not in shown.stdout] == []
        assert state_of(board.root) == {}

        first = board.flash(*options)
        assert first.returncode == 0, first.stderr
        assert f"ready: http://127.0.0.1:{port}/v1" in first.stdout
        state = state_of(board.root)
        listed = subprocess.run([*basestation, "list", str(keys), "--json"], check=True, capture_output=True).stdout
        assert [device["name"] for device in json.loads(listed)["devices"]] == ["kitchen"]

        second = board.flash(*options)
        assert second.returncode == 0, second.stderr
        assert "the board has this bundle already" in second.stdout
        assert "the board has a key already" in second.stdout
        assert state_of(board.root) == state
        assert (board.root / "run/systemctl.log").read_text().count("enable --quiet edgedraft-device") == 2
        assert_bad_bundle_is_rolled_back(board, options, tmp_path)


def assert_bad_bundle_is_rolled_back(board: Board, options: list[str], folder: Path) -> None:
    state = state_of(board.root)
    (module,) = board.root.glob("var/lib/edgedraft/venv/lib/python3*/site-packages/device/__init__.py")
    module.write_text("# of the environment before\n")
    bundle = folder / "bad"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    failed = board.flash(*options, "--bundle", str(bundle), READY_SECONDS="3")
    assert failed.returncode == 1
    assert "not healthy after 3 s; the board is back on what it had" in failed.stderr
    assert state_of(board.root) == state
    assert module.read_text() == "# of the environment before\n"
    assert {path.name for path in (board.root / "var/lib/edgedraft").iterdir()} == {"bundle", "keys", "venv"}


def with_docker(board: Board) -> None:
    for name, text in (("docker", _DOCKER), ("systemctl", "#!/bin/sh\n")):
        write_program(board, name, text)


def write_program(board: Board, name: str, text: str) -> None:
    program = board.root / "usr/bin" / name
    program.write_text(text)
    program.chmod(0o755)


@dataclass(frozen=True)
class DockerBoard:
    """A board with docker and a key, and the folder of the images that it is flashed with."""

    board: Board
    folder: Path

    def flash(self, image: str, port: int, *options: str) -> "subprocess.CompletedProcess[str]":
        """Flash an image, of which the name says how it behaves, and another bundle for each port."""
        bundle = self.folder / f"bundle-{port}"
        bundle.mkdir(exist_ok=True)
        (bundle / "manifest.json").write_text(str(port))
        (self.folder / image).write_text(image)
        options = (
            "--server",
            "tcp://10.0.0.1:5755",
            "--keys",
            f"{self.folder}/keys",
            "--bundle",
            f"{bundle}",
            *options,
        )
        options += ("--image", f"{self.folder}/{image}", "--port", f"{port}", "root@board")
        return self.board.flash(*options, READY_SECONDS="3")

    @property
    def images(self) -> dict[str, str]:
        """By name and tag."""
        return {path.name: path.read_text() for path in (self.board.root / "run/images").glob("edgedraft-*")}


@pytest.fixture
def docker_board(board: Board, tmp_path: Path) -> DockerBoard:
    with_docker(board)
    (board.root / "var/lib/edgedraft/keys").mkdir(parents=True)
    new_key(board.root / "var/lib/edgedraft/keys/device")
    KeyFolder.create(tmp_path / "keys")
    return DockerBoard(board, tmp_path)


def test_a_board_with_docker_gets_the_image(board: Board, tmp_path: Path) -> None:
    with_docker(board)
    KeyFolder.create(tmp_path / "keys")
    options = ["--server", "tcp://10.0.0.1:5755", "--keys", str(tmp_path / "keys"), "--bundle", str(BUNDLE)]
    shown = board.flash("--dry-run", *options, "root@board")
    assert shown.returncode == 0, shown.stderr
    assert "venv" not in shown.stdout
    for words in (
        "build localhost/edgedraft-device:latest for amd64",
        "docker load",
        "docker run --rm --network none",
        "--read-only --tmpfs /tmp --cap-drop ALL",
        "--volume /etc/edgedraft/device.toml:/etc/edgedraft/device.toml:ro",
        'key = "/keys/device"',
        'bind = "http://0.0.0.0:8080"',
        "--publish 127.0.0.1:8080:8080",
        "docker stop --time 5",
    ):
        assert words in shown.stdout


def test_a_board_whose_image_is_not_healthy_gets_back_what_it_had(docker_board: DockerBoard) -> None:
    root = docker_board.board.root
    first = docker_board.flash("good", 8080)
    assert first.returncode == 0, first.stderr
    state = state_of(root)
    failed = docker_board.flash("bad", 9090)
    assert failed.returncode == 1
    assert "not healthy after 3 s; the board is back on what it had" in failed.stderr
    assert docker_board.images["edgedraft-device:latest"] == "good"
    assert state_of(root) == state
    assert (root / "run/docker.log").read_text().count("image prune --force --filter label=") == 1

    alone = docker_board.flash("good but alone", 8080)
    assert alone.returncode == 1
    assert "healthy, but tcp://10.0.0.1:5755 has not answered" in alone.stderr
    images = docker_board.images
    assert images == {"edgedraft-device:latest": "good but alone", "edgedraft-device:previous": "good"}


@pytest.mark.parametrize("is_active", ["true", '[ "$1" != is-active ]'], ids=["active", "in a loop"])
def test_a_run_after_an_interrupted_one_rolls_back_to_what_was_healthy(
    is_active: str, docker_board: DockerBoard
) -> None:
    assert docker_board.flash("good", 8080).returncode == 0
    state = state_of(docker_board.board.root)
    write_program(docker_board.board, "systemctl", '#!/bin/sh\n[ "$1" = is-active ]\n')
    interrupted = docker_board.flash("bad", 9090)
    assert interrupted.returncode == 1
    assert "error: " not in interrupted.stderr
    assert state_of(docker_board.board.root) != state
    write_program(docker_board.board, "systemctl", f"#!/bin/sh\n{is_active}\n")
    failed = docker_board.flash("bad", 9090)
    assert "the board is back on what it had" in failed.stderr
    assert docker_board.images["edgedraft-device:latest"] == "good"
    assert state_of(docker_board.board.root) == state


@pytest.mark.parametrize("image", ["broken", "unnamed"])
def test_an_image_that_the_board_cannot_load_changes_nothing(image: str, docker_board: DockerBoard) -> None:
    assert docker_board.flash("good", 8080).returncode == 0
    state = state_of(docker_board.board.root)
    failed = docker_board.flash(image, 9090)
    assert failed.returncode == 1
    assert f"error: root@board could not load an image with a name from {docker_board.folder / image}" in failed.stderr
    assert docker_board.images["edgedraft-device:latest"] == "good"
    assert state_of(docker_board.board.root) == state


def test_a_board_changes_to_an_image_of_another_name_and_back(docker_board: DockerBoard) -> None:
    write_program(docker_board.board, "uname", "#!/bin/sh\necho aarch64\n")
    jetson = "--image-name", "device-jetson"
    assert docker_board.flash("good", 8080).returncode == 0
    state = state_of(docker_board.board.root)
    failed = docker_board.flash("bad", 9090, *jetson)
    assert "the board is back on what it had" in failed.stderr
    assert state_of(docker_board.board.root) == state
    changed = docker_board.flash("good jetson", 8080, *jetson)
    assert changed.returncode == 0, changed.stderr
    images = docker_board.images
    kept = {"edgedraft-device:latest": "good", "edgedraft-device:previous": "good"}
    assert images == {**kept, "edgedraft-device-jetson:latest": "good jetson"}


def test_a_new_board_whose_image_is_not_healthy_has_nothing_to_go_back_to(docker_board: DockerBoard) -> None:
    failed = docker_board.flash("bad", 8080)
    assert failed.returncode == 1
    assert "not healthy after 3 s; there is nothing to roll back to" in failed.stderr


def test_a_board_whose_key_was_revoked_is_not_enrolled_again(docker_board: DockerBoard) -> None:
    assert docker_board.flash("good", 8080).returncode == 0
    keys = KeyFolder(docker_board.folder / "keys")
    (board,) = keys.devices()
    keys.revoke(board.name)
    refused = docker_board.flash("good", 8080)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: the base station has revoked the key of root@board; remove /var/lib/")
    assert keys.devices() == []


def test_a_board_that_is_off_is_told_from_one_that_asks_for_a_password(board: Board, tmp_path: Path) -> None:
    KeyFolder.create(tmp_path / "keys")
    options = ["--server", "tcp://10.0.0.1:5755", "--keys", str(tmp_path / "keys"), "--bundle", str(BUNDLE)]
    (board.path / "authorized_keys").write_text("")
    assert "root@board asks for a password or another key" in board.flash("--dry-run", *options, "root@board").stderr
    ssh = board.path / "ssh"
    ssh.write_text(re.sub(r"-p \d+", f"-p {free_port()}", ssh.read_text()))
    assert "root@board is unreachable" in board.flash("--dry-run", *options, "root@board").stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "which board?"),
        (["--server", "10.0.0.1:5755", "board"], "tcp://HOST:PORT"),
        (["--bundle", "/nowhere", "board"], "is not a bundle"),
        (["--colour", "board"], "--colour is not an option"),
        (["--server", "tcp://10.0.0.1:5755", "board"], "--keys is missing"),
    ],
)
def test_a_wrong_call_is_one_line(options: list[str], words: str, tmp_path: Path) -> None:
    finished = Board(tmp_path, tmp_path).flash(*options)
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ")
    assert finished.stderr.count("\n") == 1
    assert words in finished.stderr
