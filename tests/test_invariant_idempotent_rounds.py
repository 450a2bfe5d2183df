"""Invariant 4: a round is idempotent; a repeated Draft gets the stored Verdict."""

from collections.abc import Callable
from typing import cast

import pytest

from basestation.target.target_model import TargetModel
from device.settings import DraftSettings, Timeouts
from protocol.limits import Limits
from protocol.messages import Decode, Draft, Open, Opened, Verdict
from tests.fakes import TARGET, FakeTarget, target_alone
from tests.invariants import (
    PROMPT,
    SAMPLED,
    SETTINGS,
    answer,
    draft_model,
    duplicate,
    every_setting,
    first_copies_lost,
    lossy,
    new_station,
    open_request,
    token_ids_of,
)
from tests.link_pair import CopyCount, MemoryTransport, Station, deliver_once, join, open_session
from tests.raw_device import CODEC, RawDevice

LOSSES: dict[str, Callable[[], tuple[CopyCount, CopyCount]]] = {
    "first Draft or Decode lost": lambda: (first_copies_lost(Draft, Decode), deliver_once),
    "first Verdict lost": lambda: (deliver_once, first_copies_lost(Verdict)),
    "first Open lost": lambda: (first_copies_lost(Open), deliver_once),
    "first Opened lost": lambda: (deliver_once, first_copies_lost(Opened)),
    "first copy of each lost": lambda: (
        first_copies_lost(Open, Draft, Decode),
        first_copies_lost(Opened, Verdict),
    ),
    "all duplicated": lambda: (duplicate, duplicate),
    "all duplicated up, first lost down": lambda: (duplicate, first_copies_lost(Opened, Verdict)),
    "30 % lost": lambda: (lossy(1), lossy(2)),
    "30 % lost, other seeds": lambda: (lossy(3), lossy(4)),
}


@every_setting
@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
def test_lost_and_repeated_frames_do_not_change_the_answer(
    settings: DraftSettings, losses: Callable[[], tuple[CopyCount, CopyCount]]
) -> None:
    up, down = losses()
    assert answer(settings, up, down) == answer(settings)


def test_the_link_loses_frames() -> None:
    station, model = new_station(), draft_model()
    transport = MemoryTransport(station, up=first_copies_lost(Draft))
    client, _ = join(station, model, transport)
    session = open_session(client, SETTINGS[0], model, PROMPT)
    token_ids_of(session)
    drafts = [frame for frame in transport.uplink if isinstance(CODEC.decode(frame), Draft)]
    assert len(drafts) == 2 * session.counters.rounds
    assert drafts[::2] == drafts[1::2]
    assert transport.now == session.counters.rounds * Timeouts().resend


def test_a_repeated_draft_gets_the_stored_verdict_without_a_forward_pass() -> None:
    target = FakeTarget(TARGET)
    station = Station(cast(TargetModel, target))
    device = RawDevice(station, b"a")
    device.request(open_request())
    draft = Draft(0, 1, tuple(target_alone(TARGET, PROMPT, 2)))
    verdict = device.request(draft)
    assert verdict == Verdict(0, 1, 2, target_alone(TARGET, PROMPT, 3)[2])
    passes = list(target.passes)
    assert [device.request(draft) for _ in range(3)] == [verdict] * 3
    assert target.passes == passes
    following = device.request(Draft(0, 2, ()))
    assert following == Verdict(0, 2, 0, target_alone(TARGET, PROMPT, 4)[3])
    assert device.request(Draft(0, 2, ())) == following
    answers = target_alone(TARGET, PROMPT, 10)
    for round_id in range(3, 3 + Limits.window):
        assert device.request(Draft(0, round_id, ())) == Verdict(0, round_id, 0, answers[round_id + 1])
    assert device.request(draft) is None  # too old: a device has at most a window of Drafts in flight


def test_a_repeated_decode_gets_all_stored_verdicts() -> None:
    target = FakeTarget(TARGET)
    station = Station(cast(TargetModel, target))
    device = RawDevice(station, b"a")
    device.request(open_request(SAMPLED))
    verdicts = [device.request(Decode(0, 1, 3)), station.pull(b"a"), station.pull(b"a")]
    assert [type(verdict) for verdict in verdicts] == [Verdict] * 3
    passes = list(target.passes)
    assert [device.request(Decode(0, 1, 3)), station.pull(b"a"), station.pull(b"a"), station.pull(b"a")] == [
        *verdicts,
        None,
    ]
    assert target.passes == passes
