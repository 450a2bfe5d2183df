"""Which devices are kept out after aborts of the front."""

import math

import pytest

from basestation.devices.quarantine import HandshakeLog, Quarantine


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def shake(quarantine: Quarantine, clock: Clock, *keys: str, after: float = 0.0) -> None:
    clock.now += after
    for key in keys:
        quarantine.note_handshake(key)


def test_a_key_whose_handshake_precedes_two_aborts_within_a_minute_is_quarantined(clock: Clock) -> None:
    quarantine = Quarantine(clock)
    shake(quarantine, clock, "honest")
    shake(quarantine, clock, "hostile", after=5)
    assert quarantine.note_abort() == []
    shake(quarantine, clock, "honest", "hostile", after=1)
    assert quarantine.note_abort() == ["hostile"]
    assert quarantine.deadlines().keys() == {"hostile"}


def test_devices_that_all_reconnect_before_each_abort_are_not_quarantined(clock: Clock) -> None:
    quarantine = Quarantine(clock)
    for last in ("first", "second"):
        shake(quarantine, clock, *(f"honest{number}" for number in range(20)), f"{last}", "hostile", "hostile", after=1)
        quarantined = quarantine.note_abort()
    assert quarantined == ["hostile"]


def test_one_abort_quarantines_nobody(clock: Clock) -> None:
    quarantine = Quarantine(clock)
    shake(quarantine, clock, "one", "other")
    assert quarantine.note_abort() == []
    assert not quarantine.deadlines()


def test_aborts_more_than_a_minute_apart_quarantine_nobody(clock: Clock) -> None:
    quarantine = Quarantine(clock)
    for _ in range(3):
        shake(quarantine, clock, "key", after=61)
        assert quarantine.note_abort() == []


def test_quarantine_ends(clock: Clock) -> None:
    quarantine = Quarantine(clock)
    for _ in range(2):
        shake(quarantine, clock, "key", after=1)
        quarantine.note_abort()
    log = HandshakeLog(lambda _: None, quarantine.deadlines(), clock)  # of a front that runs on
    clock.now += 599
    assert quarantine.deadlines().keys() == {"key"}
    assert not log.admit("key")
    clock.now += 2
    assert not quarantine.deadlines()
    assert log.admit("key")


def test_a_handshake_is_written_down_and_a_quarantined_key_is_refused() -> None:
    written = list[str]()
    log = HandshakeLog(written.append, {"hostile": math.inf})
    assert log.admit("honest")
    assert not log.admit("hostile")
    assert written == ["honest"]
