"""The figures of a front."""

from bench.setup.results import number
from bench.station.cluster import front_share, measure_front


def test_frames_pass_the_front_in_both_directions_and_its_cpu_time_is_counted() -> None:
    row = measure_front(seconds=0.5, devices=2, frame_bytes=64)
    assert number(row, "frames_per_second") > 0
    assert 0 < number(row, "core_share") < 1.2


def test_ten_times_the_replicas_need_ten_times_the_fronts() -> None:
    rows = {str(row["case"]): number(row, "fronts") for row in front_share({"cpu_microseconds_per_frame": 50.0})}
    assert rows["1 replicas of 50 rounds/s"] == 0.005
    assert rows["100 replicas of 50 rounds/s"] == 10 * rows["10 replicas of 50 rounds/s"]
