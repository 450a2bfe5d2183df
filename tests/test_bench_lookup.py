"""Prompt lookup measured: the cases, paired ratios, and a run of the command."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.grid.cells import TARGET
from bench.grid.pair_run import Measured
from bench.grid.throughput import Throughput
from bench.pair.code_edits import CODE_EDITS
from bench.pair.lookup import CODE_EDIT, lookup_cases, lookup_prompts, lookup_rows
from protocol.errors import SettingsError
from protocol.messages import Mode
from tests.sample import BUNDLE, SAMPLE

CASES = lookup_cases(Mode.IDS)


def answers(*seconds: float) -> list[Throughput]:
    return [Throughput(40, one, 1, 0.5, 80, 40, (), 10) for one in seconds]


def test_ratios_pair_the_answers_of_a_prompt() -> None:
    measured = Measured(
        {
            TARGET.name: answers(4.0, 2.0),
            CASES[1].name: answers(2.0, 1.0),
            CASES[2].name: answers(1.0, 0.5),
            CASES[3].name: answers(4.0),
        },
        {CASES[3].name: "lost"},
    )
    rows = lookup_rows(CASES, {"rag": measured})
    assert [row["over_target"] for row in rows] == [f"{one} ({one} to {one})" for one in ("1.00", "2.00", "4.00")] + [
        None
    ]
    assert rows[2]["over_draft_model"] == "2.00 (2.00 to 2.00)"
    assert [row["failed"] for row in rows] == [None, None, None, "lost"]
    assert rows[1]["tokens_per_verdict"] == 4


def test_several_categories_have_rows_of_all_their_answers() -> None:
    faster = {case.name: answers(2.0 if case is TARGET else 1.0) for case in CASES}
    slower = {case.name: answers(2.0 if case is TARGET else 4.0) for case in CASES}
    rows = lookup_rows(CASES, {"coding": Measured(faster, {}), "qa": Measured(slower, {})})
    assert [row["category"] for row in rows] == ["coding"] * 4 + ["qa"] * 4 + ["all"] * 4
    assert [row["over_target"] for row in rows[1::4]] == [
        "2.00 (2.00 to 2.00)",
        "0.50 (0.50 to 0.50)",
        "1.25 (0.50 to 2.00)",
    ]
    assert rows[-1]["answers"] == 2


def test_drafts_ahead_are_those_of_all_cases_that_draft() -> None:
    assert {case.drafts_ahead for case in lookup_cases(Mode.IDS, drafts_ahead=None)[1:]} == {None}
    assert {case.drafts_ahead for case in CASES[1:]} == {0}


def test_the_prompts_are_ten_code_edits_and_the_categories_of_a_file(tmp_path: Path) -> None:
    edits = lookup_prompts(None, None, 3)
    assert len(set(edits[CODE_EDIT])) == 10
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"category": "rag", "turns": ["Why?"]}), encoding="utf-8")
    assert lookup_prompts(file, [], 3) == {CODE_EDIT: list(CODE_EDITS), "rag": ["Why?"]}
    assert lookup_prompts(file, ["rag"], 3) == {"rag": ["Why?"]}
    with pytest.raises(SettingsError, match="code edit, rag"):
        lookup_prompts(file, ["rags"], 10)


@pytest.mark.model
@pytest.mark.parametrize("ahead", [False, True])
def test_the_command_measures_all_cases(tmp_path: Path, ahead: bool) -> None:
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "lookup.json"
    prompts.write_text(json.dumps({"category": "rag", "turns": ["Repeat: red, green, blue."]}), encoding="utf-8")
    options = ["--prompts", str(prompts), "--category", "rag", "--repeats", "1", "--max-new-tokens", "24"]
    pair = ["--bundle", str(BUNDLE), "--target", str(SAMPLE)]
    done = CliRunner().invoke(app, ["lookup", *pair, *options, "--json", str(file), *(["--ahead"] if ahead else [])])
    assert done.exit_code == 0, done.output
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["settings"]["ahead"] is ahead
    rows = written["rows"]
    assert [row["case"] for row in rows] == [case.name for case in CASES]
    assert all(row["tokens_per_second"] > 0 and row["failed"] is None for row in rows)
