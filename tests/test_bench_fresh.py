"""One process for each answer: every case has a row of paired ratios."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli import app
from tests.sample import BUNDLE, SAMPLE


@pytest.mark.model
def test_the_command_compares_first_and_later_answers_with_the_target_alone(tmp_path: Path) -> None:
    file = tmp_path / "fresh.json"
    options = ["--bundle", str(BUNDLE), "--target", str(SAMPLE), "--count", "1", "--repeats", "1"]
    options += ["--max-new-tokens", "6", "--prompt-tokens", "200", "--json", str(file)]
    result = CliRunner().invoke(app, ["fresh", *options])
    assert result.exit_code == 0, result.output
    rows = {row["case"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == ["target alone", "no state", "state"]
    assert rows["target alone"]["times_target_alone"] == "1.00 (1.00 to 1.00)"
    for row in rows.values():
        assert row["tokens_per_second"] > 0
        assert row["ttft_seconds"] > 0
        assert 180 <= row["prompt_tokens"] <= 260
