"""Capacity and churn, measured on a base station whose target is a table."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from basestation.monitoring.metrics import Metrics
from basestation.monitoring.monitor import Monitor
from basestation.server import Server
from bench.report.report import write_report
from bench.setup.results import Results, Row, format_value, number
from bench.setup.station_process import StationProcess
from bench.station.capacity import ratios
from bench.station.churn import ChurnSettings, measure_churn
from bench.station.colocated_sessions import ColocatedScore, ColocatedSessions
from bench.station.colocation import COLOCATED, FROM_DEVICES, measure_colocation, predicted_gain, session_counts
from bench.station.recorder import record
from bench.station.recording import Recording
from bench.station.replay import CapacitySettings, measure_replay
from bench.station.replay_client import ReplayTiming
from tests.fakes import DRAFT, TARGET, VOCAB, FakeDraftModel, FakeTarget, manifest
from tests.serving import ANY_PORT, serving


@pytest.fixture
def station() -> Iterator[StationProcess]:
    metrics = Metrics()
    server = Server(FakeTarget.make(TARGET), ANY_PORT, metrics=metrics)
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


def test_colocated_sessions_commit_the_targets_own_tokens() -> None:
    draft, target, of_devices = FakeTarget.make(DRAFT), FakeTarget.make(TARGET), recordings()
    colocated = ColocatedSessions(draft, target, of_devices, draft_len=3)
    committed = [0] * len(of_devices)
    for _ in range(6):
        colocated.run_round()
        for index, (sequence, recording) in enumerate(zip(colocated.sequences, of_devices, strict=True)):
            answer = sequence[len(recording.prompt_ids) :]
            assert answer[: len(recording.answer_ids)] == list(recording.answer_ids)[: len(answer)]
            committed[index] = max(committed[index], len(answer))
    score = colocated.score
    assert min(committed) > 3
    assert score.tokens == score.accepted + 6 * len(of_devices)
    assert score.drafted == 6 * 3 * len(of_devices)
    assert (len(score.draft_seconds), len(score.verify_seconds)) == (6 * 3, 6)
    colocated.release()


def test_the_predicted_gain_is_that_of_the_drafting_time() -> None:
    score = ColocatedScore(draft_seconds=[0.01, 0.02, 0.03], verify_seconds=[0.08])
    assert predicted_gain(score, 4) == pytest.approx(1 + 4 * 0.02 / 0.08)
    assert [session_counts(most) for most in (1, 4, 6, 16)] == [[1], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8, 16]]


def test_colocation_has_both_ways_to_draft_and_their_ratio(station: StationProcess, tmp_path: Path) -> None:
    settings = CapacitySettings(2, seconds=0.2, warm_up_seconds=0.1, turns=1, timing=ReplayTiming(0.0), draft_len=4)
    models = FakeTarget.make(DRAFT), FakeTarget.make(TARGET)
    rows = measure_colocation(station, *models, recordings(), manifest(VOCAB), settings, lambda: None)
    assert [(row["case"], row["sessions"]) for row in rows] == [
        *((name, count) for count in (1, 2) for name in (FROM_DEVICES, COLOCATED)),
        ("gain of drafting on devices", 1),
        ("gain of drafting on devices", 2),
    ]
    for devices, colocated, gain in ((rows[0], rows[1], rows[4]), (rows[2], rows[3], rows[5])):
        ratio = number(devices, "tokens_per_second") / number(colocated, "tokens_per_second")
        assert gain["gain"] == pytest.approx(ratio)
        assert number(gain, "predicted_gain") > 1
        assert colocated["share_outside_forward"] is None
    ratio_row: Row = {"case": "throughput", "ratio": 2.0, "goal": "at least 1"}
    Results({}, [*rows[:4], ratio_row, *rows[4:]]).write(tmp_path / "capacity.json")
    text = write_report(tmp_path, tmp_path).read_text(encoding="utf-8")
    assert "| case | sessions | gain | predicted gain |" in text


def test_churn_loses_no_session_of_a_connected_device(station: StationProcess) -> None:
    settings = ChurnSettings(sessions=30, seconds=2.0, concurrent=6, timing=ReplayTiming(0.0))
    rows = measure_churn(station, recordings(), manifest(VOCAB), settings, lambda: None)
    assert isinstance(rows[-1]["opened"], int)
    assert rows[-1]["opened"] >= 20
    assert rows[-1]["faults"] == 0
