"""Invariant 6: every byte is counted at the socket."""

import pytest

from device.settings import DraftSettings
from protocol.zmtp import socket_bytes
from tests.invariants import PROMPT, RecordingTransport, draft_model, every_setting, lossy, new_station, token_ids_of
from tests.link_pair import join, open_session


@every_setting
@pytest.mark.parametrize("lossy_link", [False, True], ids=["clean", "lossy"])
def test_every_byte_is_counted(settings: DraftSettings, lossy_link: bool) -> None:
    station, model = new_station(), draft_model()
    transport = RecordingTransport(station, up=lossy(1), down=lossy(2)) if lossy_link else RecordingTransport(station)
    client, link = join(station, model, transport)
    session = open_session(client, settings, model, PROMPT)
    token_ids_of(session)
    session.close()
    assert link.uplink_bytes == sum(map(socket_bytes, transport.uplink))
    assert link.downlink_bytes == sum(map(socket_bytes, transport.downlink))
    assert link.uplink_bytes > sum(map(len, transport.uplink)) > 0


def test_the_size_of_a_frame_includes_flags_and_length() -> None:
    assert [socket_bytes(bytes(count)) for count in (0, 1, 255, 256, 1000)] == [2, 3, 257, 265, 1009]
