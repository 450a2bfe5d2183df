"""What a front costs and how far it goes: measured frames, and the simulation of many replicas."""

import psutil
import pytest

from bench.setup.results import number
from bench.station.front_cost import BEYOND, FRONT, INNER_LINK, SINGLE, measure_frames
from bench.station.ray_nodes import ray_nodes
from bench.station.recording import Recording
from bench.station.scale_out import DeviceTimes, PassTimes, devices_of_a_replica, rounds_per_second, simulate
from protocol.errors import SettingsError
from tests.wait import wait_for

DEVICE = DeviceTimes(drafted=4, committed=3, think_seconds=0.1)
PASSES = PassTimes(seconds=0.02, token_seconds=0.001)
PASS_TOKENS = 256


def test_frames_are_counted_in_both_directions_and_so_is_their_cpu_time() -> None:
    rows = {str(row["case"]): row for row in measure_frames(seconds=0.5, devices=2, frame_bytes=64)}
    costs = {case: number(row, "cpu_microseconds_per_frame") for case, row in rows.items()}
    for case in (FRONT, INNER_LINK, SINGLE):
        assert number(rows[case], "frames_per_second") > 0
        assert 0 < number(rows[case], "core_share") < 1.2
    assert costs[BEYOND] == pytest.approx(costs[FRONT] + costs[INNER_LINK] - costs[SINGLE])


def raylets() -> set[int]:
    children = psutil.Process().children(recursive=True)
    return {one.pid for one in children if one.status() != psutil.STATUS_ZOMBIE and one.name() == "raylet"}


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_nodes_are_processes_that_end_with_the_measurement() -> None:
    with ray_nodes(2):
        wait_for(lambda: len(raylets()) == 2, 60)
        nodes = raylets()
    wait_for(lambda: not any(map(runs, nodes)), 20)


def test_the_times_of_passes_are_a_line_over_their_tokens() -> None:
    rounds = [
        {"time": float(index), "batch_tokens": tokens, "forward_seconds": 0.02 + 0.001 * tokens, "verify_seconds": 0.0}
        for index, tokens in enumerate((5, 5, 20, 40))
    ]
    passes = PassTimes.of([*rounds, rounds[-1]])
    assert (passes.seconds, passes.token_seconds) == pytest.approx((0.02, 0.001))
    with pytest.raises(SettingsError, match="all passes had one size"):
        PassTimes.of(rounds[:2])


def test_a_device_drafts_as_recorded() -> None:
    recording = Recording((1, 2), (3, 4), ((5, 6), (7,)), token_seconds=0.01)
    assert DeviceTimes.of([recording], committed=2.0, link_seconds=0.05) == DeviceTimes(1.5, 2.0, 0.065)


def test_a_lone_device_waits_for_itself_and_for_its_own_passes_alone() -> None:
    expected = 1 / (DEVICE.think_seconds + PASSES.seconds + 5 * PASSES.token_seconds)
    assert rounds_per_second(1, DEVICE, PASSES, PASS_TOKENS) == pytest.approx(expected, rel=0.05)


def test_a_replica_verifies_no_more_rounds_than_its_passes_hold() -> None:
    per_pass = PASS_TOKENS // 5
    most = per_pass / (PASSES.seconds + 5 * per_pass * PASSES.token_seconds)
    assert rounds_per_second(5000, DEVICE, PASSES, PASS_TOKENS) == pytest.approx(most, rel=0.05)


def test_a_full_replica_gives_each_device_half_of_what_a_lone_one_gets() -> None:
    full = devices_of_a_replica(DEVICE, PASSES, PASS_TOKENS)
    alone = rounds_per_second(1, DEVICE, PASSES, PASS_TOKENS)
    assert rounds_per_second(full, DEVICE, PASSES, PASS_TOKENS) / full >= alone / 2
    assert rounds_per_second(2 * full, DEVICE, PASSES, PASS_TOKENS) / (2 * full) < alone / 2


def test_ten_times_the_replicas_need_ten_times_the_fronts() -> None:
    rows = {str(row["case"]): row for row in simulate(DEVICE, PASSES, PASS_TOKENS, frame_seconds=50e-6)}
    few, many = (number(rows[f"{count} full replicas"], "fronts") for count in (10, 100))
    assert many == pytest.approx(10 * few)
    assert number(rows["one front is full"], "fronts") == pytest.approx(1)
    assert number(rows["one front is full"], "frames_per_second") == pytest.approx(1 / 50e-6)
    assert number(rows["1,000,000 devices"], "devices") == 1_000_000
