"""A board for ``docker/flash.sh`` without a board: an ``ssh`` that runs its command among a few programs."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from basestation.devices.key_folder import KeyFolder
from tests.sample import DOCKER

_SSH = """#!/bin/sh
for command; do :; done
[ -z "${SSH_SAYS-}" ] || { echo "$SSH_SAYS" >&2; exit 255; }
PATH=$BOARD exec sh -c "$command"
"""
_SUDO = """#!/bin/sh
[ -z "${SUDO_SAYS-}" ] || { echo "$SUDO_SAYS" >&2; exit 1; }
[ "$1" = -n ] || exec "$@"
"""
_BOARD = {
    "sudo": _SUDO,
    "id": "#!/bin/sh\necho 1000\n",
    "uname": "#!/bin/sh\necho $MACHINE\n",
    "hostname": "#!/bin/sh\necho kitchen\n",
    "systemctl": "#!/bin/sh\nexit 3\n",
    "getent": "#!/bin/sh\nprintf 'video:x:44:\\nrender:x:104:\\n'\n",
    "docker": """#!/bin/sh
case "$*" in
  info*Runtimes*) echo "{\\"$RUNTIME\\":{}}" ;;
  info*) exit $DOCKER_EXIT ;;
  "manifest inspect"*) exit $MANIFEST_EXIT ;;
esac
""",
    "python3": "#!/bin/sh\nexit $PYTHON_EXIT\n",
}
_TOOLS = ("sh", "cat", "cut", "grep", "sha256sum")
_BUILDER = """#!/bin/sh
[ "$1" = info ]
"""


@dataclass(frozen=True)
class StubBoard:
    """Only for calls that change nothing, so with ``--dry-run`` or in vain.

    Attributes:
        folder: the programs of this machine and of the board, a bundle and the base station's ``keys``.
    """

    folder: Path

    @classmethod
    def create(cls, folder: Path, has_docker: bool = True) -> "StubBoard":
        """Write the programs; nothing was installed on the board yet."""
        board = folder / "board"
        board.mkdir()
        for name, text in _BOARD.items():
            if has_docker or name != "docker":
                _write(board / name, text)
        for name in _TOOLS:
            (board / name).symlink_to(str(shutil.which(name)))
        _write(folder / "ssh", _SSH)
        _write(folder / "docker", _BUILDER)
        (folder / "binfmt").mkdir()
        (folder / "binfmt" / "qemu-aarch64").touch()
        (folder / "manifest.json").touch()
        KeyFolder.create(folder / "keys")
        return cls(folder)

    def flash(self, *options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run ``docker/flash.sh`` for the board; ``environment`` says how it and its connection behave."""
        path = f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        exits = dict.fromkeys(("DOCKER_EXIT", "MANIFEST_EXIT", "PYTHON_EXIT"), "0")
        given = {"--server": "tcp://10.0.0.1:5755", "--keys": f"{self.folder}/keys", "--bundle": str(self.folder)}
        rest = [word for pair in given.items() if pair[0] not in options for word in pair]
        return subprocess.run(
            [str(DOCKER / "flash.sh"), *rest, *options, "board"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=os.environ
            | {"MACHINE": "aarch64", "RUNTIME": "runc"}
            | exits
            | {"PATH": path, "BOARD": f"{self.folder}/board", "BINFMT": f"{self.folder}/binfmt"}
            | environment,
        )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
