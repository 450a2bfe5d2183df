"""The temporary folders of processes that were killed are removed by the next one, and no others."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.scratch_folder import scratch_folder
from tests.sample import PROJECT

PREFIX = ".bundle.unfinished-"
HOLD = f"""
import sys
from pathlib import Path
from common.scratch_folder import scratch_folder

with scratch_folder(Path(sys.argv[1]), {PREFIX!r}) as folder:
    (folder / "file").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_process(parent: Path) -> Iterator[tuple[Path, "subprocess.Popen[str]"]]:
    """Its folder, and the process that has it until it is killed."""
    command = [sys.executable, "-c", HOLD, str(parent)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, cwd=PROJECT, stdin=pipe, stdout=pipe) as process:
        try:
            assert process.stdout is not None
            yield Path(process.stdout.readline().strip()), process
        finally:
            process.kill()


def test_a_folder_is_removed_at_the_end(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, PREFIX) as folder:
        (folder / "file").touch()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_renamed_stays(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, PREFIX) as folder:
        folder.rename(tmp_path / "kept")
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]


def test_the_folders_of_killed_processes_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    own = tmp_path / ".bundle.backup"
    own.mkdir()
    with other_process(tmp_path) as (theirs, process):
        with scratch_folder(tmp_path, PREFIX) as first, scratch_folder(tmp_path, PREFIX) as second:
            assert {*tmp_path.iterdir()} == {own, theirs, first, second}
            assert (theirs / "file").exists()
        process.kill()
        process.wait()
        assert {*tmp_path.iterdir()} == {own, theirs}
        with scratch_folder(tmp_path, PREFIX) as folder:
            assert {*tmp_path.iterdir()} == {own, folder}
    assert list(tmp_path.iterdir()) == [own]
