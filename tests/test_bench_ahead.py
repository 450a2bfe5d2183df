"""Drafts in flight against one Draft at a time: every case has a row of paired ratios."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.grid.ahead import cases
from bench.grid.ratio import Ratio
from protocol.errors import SettingsError
from protocol.messages import Mode
from tests.sample import BUNDLE, SAMPLE


def test_cases_are_the_target_alone_and_each_draft_length_with_and_without_drafts_ahead() -> None:
    chosen = cases(0.0, [4, 8])
    assert [(one.mode, one.draft_len, one.drafts_ahead) for one in chosen.values()] == [
        (Mode.TARGET, None, 0),
        *((Mode.IDS, draft_len, ahead) for ahead in (0, None) for draft_len in (None, 4, 8)),
    ]
    assert {one.mode for one in cases(1.0, [4]).values()} == {Mode.TARGET, Mode.COUPLED}
    assert {one.mode for one in cases(1.0, [4], Mode.TOPK).values()} == {Mode.TARGET, Mode.TOPK}


def test_the_mode_of_the_target_alone_is_refused() -> None:
    result = CliRunner().invoke(app, ["ahead", "--bundle", "none", "--target", "none", "--mode", "target"])
    assert isinstance(result.exception, SettingsError)
    assert "mode is 'target'; allowed: a mode that drafts" in str(result.exception)


def test_a_ratio_is_that_of_paired_figures() -> None:
    drifting = [1.0, 10.0, 100.0, 1000.0]
    assert Ratio.of([2 * one for one in drifting], drifting) == Ratio(2.0, 2.0, 2.0, 2.0)
    spread = Ratio.of([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert 1.0 <= spread.low < spread.median == 3.0 < spread.high <= 5.0
    assert spread.worst == 1.0
    assert Ratio.of([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5, 1.5)


@pytest.mark.model
def test_the_command_writes_a_row_per_case(tmp_path: Path) -> None:
    file = tmp_path / "ahead.json"
    options = ["--bundle", str(BUNDLE), "--target", str(SAMPLE), "--count", "1", "--repeats", "1"]
    options += ["--max-new-tokens", "12", "--draft-len", "3", "--temperature", "0", "--round-trip-ms", "30"]
    options += ["--uplink-mbit", "5"]
    result = CliRunner().invoke(app, ["ahead", *options, "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = {row["case"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == [
        "target alone",
        *(f"{name}, {one}" for name in ("one at a time", "ahead") for one in ("auto", 3)),
    ]
    assert rows["target alone"]["times_target_alone"] == "1.00 (1.00 to 1.00)"
    assert rows["target alone"]["invalidated_share"] is None
    assert rows["one at a time, 3"]["times_best_one_at_a_time"] == "1.00 (1.00 to 1.00)"
    fixed = [rows["one at a time, 3"], rows["ahead, 3"]]
    best = max(fixed, key=lambda row: row["tokens_per_second"])
    assert best["times_best_fixed"] == "1.00 (1.00 to 1.00)"
    assert rows["one at a time, 3"]["invalidated_share"] == 0
    links = {(row["round_trip_ms"], row["uplink_mbit"]) for row in rows.values()}
    assert links == {(30, 5)}
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
