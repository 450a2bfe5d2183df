"""A real pair, which ``make pair`` downloads, behind a base station with its target in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.setup.bench_setup import BenchSetup, bench_setup
from bench.setup.station_process import running_station
from tests.sample import PAIR

DRAFT_LENS = (1, 4, 8)


@contextmanager
def pair_setup(bundle: Path = PAIR / "bundle") -> Iterator[BenchSetup]:
    with running_station(str(PAIR / "target"), "float32") as address, bench_setup(bundle, address) as setup:
        yield setup
