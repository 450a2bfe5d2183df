"""A folder is written completely or not at all."""

from contextlib import suppress
from pathlib import Path

import pytest

from export.atomic_folder import atomic_folder
from protocol.errors import SettingsError


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new" / "folder") as output:
        (output / "file").write_text("new")
        assert not (tmp_path / "new" / "folder").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]
    with atomic_folder(tmp_path / "new" / "folder") as output:
        (output / "other").write_text("replaced")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["other"]


def test_an_error_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    with suppress(ValueError), atomic_folder(tmp_path / "folder") as output:
        (output / "file").write_text("new")
        raise ValueError
    assert [path.read_text() for path in tmp_path.rglob("file")] == ["old"]


@pytest.mark.parametrize("failure", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_folder_that_cannot_be_replaced_stays(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "folder", Path.rename
    folder.mkdir()
    (folder / "file").write_text("old")

    def fail(path: Path, target: Path) -> Path:
        if (path.name, target) == ("folder", folder):
            raise failure
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(failure)), atomic_folder(folder) as output:
        (output / "file").write_text("new")
    assert [path.read_text() for path in tmp_path.rglob("file")] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_mount_point_is_refused_before_the_work_begins() -> None:
    with pytest.raises(SettingsError, match=r"the output folder is '/proc'.*a folder within it"):
        atomic_folder(Path("/proc")).__enter__()


def test_a_folder_whose_replacement_a_kill_interrupted_is_put_back(tmp_path: Path) -> None:
    replaced = tmp_path / ".folder.unfinished-abcdefgh" / "folder.replaced"
    replaced.mkdir(parents=True)
    (replaced / "file").write_text("old")
    with suppress(ValueError), atomic_folder(tmp_path / "folder"):
        raise ValueError
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    assert (tmp_path / "folder" / "file").read_text() == "old"
