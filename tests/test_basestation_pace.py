"""The Welcome tells the target's pace: what a pass takes for a device that joins now, without prefill and outliers."""

from dataclasses import replace

import pytest
import torch

from basestation.engine.pace import PassTimes
from basestation.target.segment import Segment
from protocol.messages import Decode, Draft, Mode, Open, Opened, Sampling, Welcome
from tests.fakes import TARGET, VOCAB, FakeTarget
from tests.link_pair import Station
from tests.raw_device import RawDevice, hello

FORWARD, ROW, PREFILLED_ROW = 0.030, 0.002, 0.5


class SteadyTarget(FakeTarget):
    """Takes ``FORWARD`` seconds and ``ROW`` more for each token, or ``PREFILLED_ROW`` where it prefills."""

    station: Station

    def forward(self, segments: list[Segment]) -> torch.Tensor:  # type: ignore[override]
        tokens = sum(len(segment.token_ids) for segment in segments)
        prefilled = tokens - sum(segment.num_logits for segment in segments)
        self.station.now += FORWARD + ROW * tokens + PREFILLED_ROW * prefilled
        return super().forward(segments)


def new_station() -> Station:
    target = SteadyTarget(TARGET)
    target.station = Station(target)  # type: ignore[arg-type]
    return target.station


def run_rounds(station: Station, *peers: bytes) -> RawDevice:
    """Run rounds of different lengths, those of all peers in turn; returns the last device."""
    devices = [RawDevice(station, peer) for peer in peers]
    for device in devices:
        assert isinstance(device.request(Open(0, 0, Mode.IDS, Sampling(), (3, 1, 4, 1, 5))), Opened)
    for index in range(40):
        for device in devices:
            device.request(Draft(0, 1 + index, tuple(range(index % 5))))
    return device


def welcome_of(station: Station, peer: bytes = b"new", version: int = 4) -> Welcome:
    welcome = RawDevice(station, peer, greet=False).request(replace(hello(VOCAB), version=version))
    assert isinstance(welcome, Welcome)
    return welcome


def test_nothing_is_told_before_the_first_pass() -> None:
    welcome = welcome_of(new_station())
    assert (welcome.pass_seconds, welcome.row_seconds) == (0, 0)


def test_the_measured_pace_of_passes_without_prefill_is_told() -> None:
    station = new_station()
    run_rounds(station, b"a")
    station.now += 10
    welcome = welcome_of(station)
    assert welcome.pass_seconds == pytest.approx(FORWARD + ROW, rel=0.05)
    assert welcome.row_seconds == pytest.approx(ROW, rel=0.25)


def test_a_device_of_an_older_version_is_told_no_pace() -> None:
    station = new_station()
    run_rounds(station, b"a")
    assert welcome_of(station, version=4).pass_seconds
    for version in (1, 2, 3):
        welcome = welcome_of(station, version=version)
        assert (welcome.version, welcome.pass_seconds, welcome.row_seconds) == (version, 0, 0)


def test_tokens_of_other_devices_that_are_active_now_count_and_own_or_idle_ones_do_not() -> None:
    station = new_station()
    run_rounds(station, b"a", b"b")
    alone, both = welcome_of(station, b"a"), welcome_of(station, b"new")
    assert both.pass_seconds > alone.pass_seconds > FORWARD + ROW
    station.now += 10
    assert welcome_of(station).pass_seconds == pytest.approx(FORWARD + ROW, rel=0.05)


def test_the_pace_that_a_replica_reports_is_that_of_the_welcome() -> None:
    station = new_station()
    run_rounds(station, b"a", b"b")
    for _ in ("active", "idle"):
        station.engine.measure_load()
        pace, welcome = station.engine.load.pace, welcome_of(station)
        assert (pace.pass_seconds, pace.row_seconds) == (welcome.pass_seconds, welcome.row_seconds)
        station.now += 10


def steady_times(passes: int = 50) -> PassTimes:
    times = PassTimes()
    for index in range(passes):
        tokens = 1 + index % 8
        times.observe(1, tokens, FORWARD + ROW * tokens)
    return times


def test_an_outlier_changes_the_pace_little() -> None:
    times = steady_times()
    times.observe(1, 4, 60.0)
    assert times.pace(0).pass_seconds == pytest.approx(FORWARD + ROW, rel=0.1)


@pytest.mark.parametrize("factor", [0.2, 8.0])
def test_a_lasting_change_is_followed(factor: float) -> None:
    times = steady_times()
    for index in range(400):
        tokens = 1 + index % 8
        times.observe(1, tokens, factor * (FORWARD + ROW * tokens))
    assert times.pace(0).pass_seconds == pytest.approx(factor * (FORWARD + ROW), rel=0.1)


def test_passes_of_one_size_tell_their_own_time() -> None:
    times = PassTimes()
    for _ in range(20):
        times.observe(1, 1, FORWARD)
    pace = times.pace(0)
    assert pace.pass_seconds == pytest.approx(FORWARD)
    assert pace.row_seconds == pytest.approx(0.0, abs=1e-9)


def test_a_decode_is_measured_like_a_round() -> None:
    station = new_station()
    device = run_rounds(station, b"a")
    station.engine._pass_times = PassTimes()
    device.request(Decode(0, 41, 5))
    while device.receive() is not None:
        pass
    assert welcome_of(station, b"a").pass_seconds == pytest.approx(FORWARD + ROW)
