"""How ``scale`` finds a base station that serves on this machine."""

from contextlib import closing
from pathlib import Path

import pytest

from basestation.replicas.control import Control, ask_for_replicas, control_file
from protocol.errors import LinkError


def test_the_last_number_asked_for_is_told_once(tmp_path: Path) -> None:
    with closing(Control(tmp_path / "edgedraft" / "control")) as control:
        for replicas in (3, 2):
            ask_for_replicas(tmp_path / "edgedraft" / "control", replicas)
        assert [control.request(), control.request()] == [2, None]


def test_a_file_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "control").write_text("left over")
    with closing(Control(tmp_path / "control")) as control:
        ask_for_replicas(tmp_path / "control", 4)
        assert control.request() == 4


def test_without_a_base_station_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="no base station with --replicas answers"):
        ask_for_replicas(tmp_path / "control", 2)


def test_two_base_stations_of_one_machine_have_files_of_their_own() -> None:
    assert control_file("tcp://127.0.0.1:5755") != control_file("tcp://127.0.0.1:5756")
