"""Runs images as a container engine does: as their user, without capabilities, on a read-only root, with volumes."""

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CONTAIN = """
set -eu
root=$1 user=$2; shift 2
mount --bind "$root" "$root"
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p "$root$2"; else touch "$root$2"; fi
  mount --bind "$1" "$root$2"; shift 2
done
shift
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
exec setpriv --no-new-privs --bounding-set=-all,+sys_chroot,+setuid,+setgid \
  chroot --userspec="$user" --groups= "$root" "$@"
"""
"""ROOT USER (HOST CONTAINER)… -- COMMAND…: each step execs the next, so signals reach the command."""


@dataclass(frozen=True)
class Image:
    """An image mounted at ``root``; ``network`` names a network namespace, None is the host's.

    ``environment`` is added to the image's own.
    """

    root: Path
    config: Mapping[str, Any]
    network: str | None = None
    volumes: Mapping[Path, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, arguments: Sequence[str], entrypoint: Sequence[str] | None = None) -> list[str]:
        """The command that runs a container of this image."""
        start = [*(self.config["Entrypoint"] if entrypoint is None else entrypoint), *arguments]
        mounts = [str(path) for pair in self.volumes.items() for path in pair]
        inside = ["unshare", "--mount", "sh", "-c", _CONTAIN, "sh", str(self.root), self.config["User"], *mounts, "--"]
        added = (f"{name}={value}" for name, value in self.environment.items())
        environment = ["env", "-i", *self.config["Env"], "HOME=/", *added]
        return [*in_network(self.network), *inside, *environment, *start]

    def run(self, *arguments: str, entrypoint: Sequence[str] | None = None) -> "subprocess.CompletedProcess[str]":
        """Run a container until it exits."""
        command = self.command(arguments, entrypoint)
        return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)

    @contextmanager
    def started(self, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
        """Run a container in the background and kill it at the end of the block; its stderr is piped."""
        command = self.command(arguments)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def healthy(self) -> bool:
        """Run the image's health check."""
        kind, *check = self.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return self.run(*check, entrypoint=[]).returncode == 0

    def size(self) -> dict[str, int]:
        """Size in bytes of each Python package, and of everything else as ``base``."""
        packages = next(self.root.glob("opt/edgedraft/lib/python3*/site-packages"))
        parts = {path.name: _bytes(path) for path in packages.iterdir()}
        return {"base": _bytes(self.root) - sum(parts.values()), **parts}


@contextmanager
def image(
    name: str,
    network: str | None = None,
    volumes: Mapping[Path, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Image]:
    """Mount the image ``localhost/edgedraft-NAME``."""
    tag = f"localhost/edgedraft-{name}"
    container = buildah("from", "--pull-never", tag)
    try:
        config = json.loads(buildah("inspect", "--type", "image", tag))["Docker"]["config"]
        yield Image(Path(buildah("mount", container)), config, network, volumes or {}, environment or {})
    finally:
        buildah("rm", container)


def buildah(*arguments: str) -> str:
    """Run buildah and return its output."""
    finished = subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=True)
    return finished.stdout.strip()


@contextmanager
def network(name: str) -> Iterator[str]:
    """A network namespace with only a loopback interface, unreachable from other machines."""
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run([*in_network(name), "ip", "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def in_network(name: str | None) -> list[str]:
    """The prefix that runs a command in network namespace ``name``."""
    return ["ip", "netns", "exec", name] if name else []


def _bytes(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    return sum({(s.st_dev, s.st_ino): s.st_size for s in (file.lstat() for file in files)}.values())
