"""How ``scale`` and ``restart`` reach a base station that serves on this machine."""

from contextlib import closing
from pathlib import Path

import pytest

from basestation.replicas.control import Control, Restart, Scale, control_file, send_request
from protocol.errors import LinkError


def test_requests_arrive_in_order_and_once(tmp_path: Path) -> None:
    with closing(Control(tmp_path / "edgedraft" / "control")) as control:
        for request in (Scale(3), Restart(), Scale(2)):
            send_request(tmp_path / "edgedraft" / "control", request)
        assert list(control.requests()) == [Scale(3), Restart(), Scale(2)]
        assert list(control.requests()) == []


def test_a_file_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "control").write_text("left over")
    with closing(Control(tmp_path / "control")) as control:
        send_request(tmp_path / "control", Scale(4))
        assert list(control.requests()) == [Scale(4)]


def test_without_a_base_station_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="no base station with --replicas answers"):
        send_request(tmp_path / "control", Restart())


def test_two_base_stations_of_one_machine_have_files_of_their_own() -> None:
    assert control_file("tcp://127.0.0.1:5755") != control_file("tcp://127.0.0.1:5756")
