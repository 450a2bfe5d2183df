"""The gain by category of prompt: paired ratios, the round model, and a result file that grows."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.grid.cells import COLOCATED, TARGET
from bench.grid.pair_run import Measured
from bench.grid.recording_planner import RoundFigures
from bench.grid.throughput import Throughput
from bench.pair.category_rows import CategoryCell, category_cases, category_rows
from bench.pair.category_summary import display_rows, summary_rows
from bench.setup.prompts import prompts_by_category, read_prompts
from bench.setup.results import number
from protocol.errors import SettingsError
from protocol.messages import Mode
from tests.fakes import QUALITY
from tests.sample import BUNDLE, SAMPLE

CELL = CategoryCell("coding", 0.0)
CASES = category_cases(0.0)
FIXED = next(case.name for case in CASES if case.draft_len)


def answer(tokens: int, seconds: float, rounds: list[RoundFigures] | None = None) -> Throughput:
    found = rounds or []
    return Throughput(tokens, seconds, 1, 0.5, 3 * tokens, 2 * tokens, found, len(found) or tokens)


def drafting() -> Throughput:
    """Rounds of 8 and of 4 tokens, half of which are accepted, with a verification time of 50 + 2γ ms."""
    rounds = [
        RoundFigures((None,) * drafted, accepted, 0.01 * drafted, 0.05 + 0.002 * drafted)
        for drafted, accepted in [(8, 8), (8, 0), (4, 4), (4, 0)]
    ]
    seconds = sum(one.draft_seconds + (one.reply_seconds or 0) for one in rounds)
    return answer(sum(one.accepted + 1 for one in rounds), seconds, rounds)


def measured(**changed: list[Throughput]) -> Measured:
    answers = {case.name: [drafting(), drafting()] for case in CASES}
    return Measured({**answers, TARGET.name: [answer(20, 1.0), answer(20, 2.0)], **changed}, {})


def test_the_cases_are_the_modes_of_the_temperature_between_the_target_alone_and_the_draft_beside_it() -> None:
    assert [case.mode for case in CASES] == [Mode.TARGET, *[Mode.IDS] * 4, Mode.TOPK, Mode.IDS]
    modes = [case.mode for case in category_cases(1.0)]
    assert modes == [Mode.TARGET, *[Mode.COUPLED] * 4, Mode.TOPK, Mode.TOPP, Mode.COUPLED]
    assert [case.name for case in CASES if case.drafts_ahead is None] == [
        "ids, ahead, auto",
        "ids, ahead, lookup, auto",
    ]
    assert [case.name for case in CASES if case.lookup] == ["ids, ahead, lookup, auto"]
    assert [case.name for case in CASES if case.colocated] == [COLOCATED]


def test_ratios_pair_the_answers_of_a_prompt() -> None:
    twice = [answer(40, 1.0), answer(40, 2.0)]
    rows = {row["case"]: row for row in category_rows(CELL, CASES, measured(**{FIXED: twice}), QUALITY)}
    assert rows[FIXED]["speedup"] == 2.0
    assert rows[FIXED]["speedup_interval"] == "2.00 to 2.00"
    assert rows[FIXED]["speedup_with_prompt"] == pytest.approx((41 / 1.5 / (21 / 1.5) + 41 / 2.5 / (21 / 2.5)) / 2)
    assert number(rows[FIXED], "over_colocated") < 2.0
    assert rows[TARGET.name]["speedup"] == 1.0


def test_a_case_that_failed_keeps_its_row_and_the_others_their_ratios() -> None:
    failing = Measured({**measured().answers, FIXED: [drafting()]}, {FIXED: "refused"})
    rows = {row["case"]: row for row in category_rows(CELL, CASES, failing, QUALITY)}
    assert (rows[FIXED]["failed"], rows[FIXED]["speedup"], rows[FIXED]["over_round_model"]) == ("refused", None, None)
    assert rows["ids, auto"]["speedup"]
    none_left = Measured({case.name: [] for case in CASES}, dict.fromkeys([case.name for case in CASES], "died"))
    assert {row["speedup"] for row in category_rows(CELL, CASES, none_left, QUALITY)} == {None}


def test_an_answer_that_ends_with_its_first_round_has_no_ratio() -> None:
    empty = measured(**{FIXED: [answer(0, 0.0), drafting()]})
    rows = {row["case"]: row for row in category_rows(CELL, CASES, empty, QUALITY)}
    expected = drafting().tokens_per_second / 10.0
    assert rows[FIXED]["speedup"] == pytest.approx(expected)


def test_the_round_model_takes_the_measured_acceptance_drafting_time_and_verification_line() -> None:
    rows = {row["case"]: row for row in category_rows(CELL, CASES, measured(), QUALITY)}
    row = rows[FIXED]
    assert row["acceptance_length"] == 4.0
    assert row["acceptance_rate"] == 0.5
    assert row["tokens_per_round"] == 4.0
    target_seconds = 3.0 / 40
    tokens = 1 + 8 * 0.5  # half of the rounds of 8 are accepted as a whole
    expected = tokens * target_seconds / (8 * 0.01 + 0.05 + 8 * 0.002)
    assert row["predicted_speedup"] == pytest.approx(expected, rel=1e-3)
    assert row["over_round_model"] == pytest.approx(number(row, "speedup") / expected, rel=1e-3)
    assert rows["ids, auto"]["predicted_speedup"]
    assert {rows[name]["predicted_speedup"] for name in (COLOCATED, "ids, ahead, auto")} == {None}


def test_the_round_model_takes_no_acceptance_that_a_planner_selected() -> None:
    """At temperature 0 all modes accept what the case with a fixed draft length does."""
    rows = {row["case"]: row for row in category_rows(CELL, CASES, measured(), QUALITY)}
    assert rows["topk 32, auto"]["predicted_speedup"] == pytest.approx(rows["ids, auto"]["predicted_speedup"])
    cases = category_cases(1.0)
    answers = {case.name: [drafting()] for case in cases}
    warm = {
        row["case"]: row for row in category_rows(CategoryCell("coding", 1.0), cases, Measured(answers, {}), QUALITY)
    }
    assert warm["coupled, auto"]["predicted_speedup"]
    assert warm["topk 32, auto"]["predicted_speedup"] is warm["topp 256, auto"]["predicted_speedup"] is None


def test_the_summary_names_the_category_with_the_least_speedup() -> None:
    slow = measured(**{FIXED: [answer(10, 1.0), answer(10, 2.0)]})
    rows = [
        *category_rows(CELL, CASES, measured(), QUALITY),
        *category_rows(CategoryCell("qa", 0.0), CASES, slow, QUALITY),
    ]
    found = next(row for row in summary_rows(rows) if row["case"] == FIXED)
    assert (found["categories"], found["least_speedup"], found["in_category"]) == (2, 0.5, "qa")
    assert TARGET.name not in {row["case"] for row in summary_rows(rows)}
    assert len(display_rows(rows)) == len(rows)


def questions(tmp_path: Path, *categories: str) -> Path:
    path = tmp_path / "questions.jsonl"
    lines = [{"category": one, "turns": [f"Name {index} rivers.", "More."]} for index, one in enumerate(categories, 1)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def test_prompts_are_the_first_turns_of_each_category(tmp_path: Path) -> None:
    path = questions(tmp_path, "a", "a", "a", "b")
    assert prompts_by_category(path, 2) == {"a": ["Name 1 rivers.", "Name 2 rivers."], "b": ["Name 4 rivers."]}
    assert read_prompts(path, 3) == ["Name 1 rivers.", "Name 4 rivers.", "Name 2 rivers."]
    path.write_text('{"turns": ["Why?"]}', encoding="utf-8")
    with pytest.raises(SettingsError, match="category"):
        prompts_by_category(path, 2)
    for turns in ('"Why?"', "[1]", "[[]]", "[]", "null"):
        path.write_text(f'{{"category": "a", "turns": {turns}}}', encoding="utf-8")
        with pytest.raises(SettingsError, match=r'lines like \{"turns": \["…"\]\}'):
            prompts_by_category(path, 2)
    path.write_text("", encoding="utf-8")
    with pytest.raises(SettingsError, match="at least one prompt"):
        read_prompts(path, 1)


@pytest.mark.model
def test_the_command_measures_what_its_file_does_not_have_yet(tmp_path: Path) -> None:
    file, prompts = tmp_path / "categories.json", questions(tmp_path, "a", "b")
    options = ["--bundle", str(BUNDLE), "--target", str(SAMPLE), "--prompts", str(prompts), "--json", str(file)]
    options += ["--repeats", "1", "--max-new-tokens", "16", "--temperature", "0"]
    unknown = CliRunner().invoke(app, ["categories", *options, "--category", "c"])
    assert isinstance(unknown.exception, SettingsError)
    written = []
    for _ in range(2):
        result = CliRunner().invoke(app, ["categories", *options, "--category", "a"])
        assert result.exit_code == 0, result.output
        written.append(json.loads(file.read_text(encoding="utf-8"))["rows"])
    assert [row["case"] for row in written[0]] == [case.name for case in CASES]
    assert {(row["category"], row["failed"]) for row in written[0]} == {("a", None)}
    assert written[1] == written[0]
