"""Capacity and churn, measured on a base station whose target is a table."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from basestation.metrics import Metrics
from basestation.monitor import Monitor
from basestation.server import Server
from bench.report.report import write_report
from bench.setup.results import Results, format_value
from bench.setup.station_process import StationProcess
from bench.station.capacity import ratios
from bench.station.churn import ChurnSettings, measure_churn
from bench.station.recorder import record
from bench.station.recording import Recording
from bench.station.replay import CapacitySettings, measure_replay
from bench.station.replay_client import ReplayTiming
from tests.fakes import FakeDraftModel, FakeTarget, blend, manifest, random_table
from tests.serving import serving

VOCAB = 12
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.7)


@pytest.fixture
def station() -> Iterator[StationProcess]:
    metrics = Metrics()
    server = Server(FakeTarget.make(TARGET), "tcp://127.0.0.1:0", metrics=metrics)
    with closing(Monitor("127.0.0.1:0", metrics)) as monitor, serving(server):
        yield StationProcess(server.address, monitor.url, os.getpid())


def recordings() -> list[Recording]:
    prompts = [[1 + index, 2, 3] for index in range(4)]
    return record(FakeDraftModel.make(DRAFT), FakeTarget.make(TARGET), prompts, 12, 4, lambda: None)


def test_capacity_has_a_row_per_case_and_its_ratios(station: StationProcess, tmp_path: Path) -> None:
    settings = CapacitySettings(4, seconds=0.3, warm_up_seconds=0.1, turns=1, timing=ReplayTiming(0.0))
    rows = measure_replay(station, recordings(), manifest(VOCAB), settings, lambda: None)
    assert [(row["case"], row["sessions"]) for row in rows] == [
        ("replay", 1),
        ("replay", 4),
        ("target", 1),
        ("target", 4),
        ("rounds", 8),
        ("rounds during prefills of 2000 tokens", 8),
    ]
    for row in rows:
        assert isinstance(row["tokens_per_second"], float)
        assert row["tokens_per_second"] > 0
    compared = ratios(rows, 4)
    assert len(compared) == 4
    Results({"sessions": 4}, [*rows, *compared]).write(tmp_path / "capacity.json")
    text = write_report(tmp_path, tmp_path).read_text(encoding="utf-8")
    for one in rows:
        assert f"| {one['case']} | {one['sessions']} |" in text
    for one in compared:
        assert f"| {one['case']} | {format_value(one['ratio'])} | {one['goal']} |" in text


def test_churn_loses_no_session_of_a_connected_device(station: StationProcess) -> None:
    settings = ChurnSettings(sessions=30, seconds=2.0, concurrent=6, timing=ReplayTiming(0.0))
    rows = measure_churn(station, recordings(), manifest(VOCAB), settings, lambda: None)
    assert isinstance(rows[-1]["opened"], int)
    assert rows[-1]["opened"] >= 20
    assert rows[-1]["faults"] == 0
