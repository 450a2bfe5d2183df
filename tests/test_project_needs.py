"""A target of the Makefile whose programs are missing names all of them before it starts."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.sample import PROJECT

_PACKAGES = {
    "test": "systemd",
    "test-images": "debootstrap buildah qemu-user-static binfmt-support openssh-server openssh-client shellcheck "
    "iproute2 systemd",
    "test-pages": "chromium prometheus",
    "screenshots": "chromium",
    "test-clients": "nodejs npm",
    "peers": "npm",
}


def make(target: str, path: Path) -> "subprocess.CompletedProcess[str]":
    command = [str(shutil.which("make")), "--directory", str(PROJECT), target]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={"PATH": str(path)})


@pytest.mark.parametrize(("target", "packages"), _PACKAGES.items())
def test_missing_packages_are_one_line_with_the_command_that_installs_them(
    target: str, packages: str, tmp_path: Path
) -> None:
    done = make(target, tmp_path)
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert done.returncode == 2
    named = error.partition("apt-get install ")[2].split()
    assert [package for package in named if package != "fonts-dejavu-core"] == packages.split()


def test_a_target_with_its_programs_starts(tmp_path: Path) -> None:
    for program in ("node", "npm"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    done = make("needs-test-clients", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
