"""Block verification measured: the cases, paired ratios, and a run of the command."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.grid.cells import Case
from bench.grid.pair_run import Measured
from bench.grid.recording_planner import RoundFigures
from bench.grid.throughput import Throughput
from bench.pair import verification as verification_module
from bench.pair.verification import ALL, BLOCK, TOKEN, verification_cases, verification_rows
from protocol.messages import Mode
from tests.sample import BUNDLE, SAMPLE


def answer(accepted: int, reply_seconds: float, rounds: int = 4) -> Throughput:
    figures = [RoundFigures((None,) * 8, accepted, 0.1, reply_seconds)] * rounds
    return Throughput(40, 1.0, 1, 0.5, 80, 40, figures, 10)


def test_the_cases_differ_in_verification_alone() -> None:
    cases = verification_cases(8)
    assert [(case.mode, case.draft_len, case.block_verification) for case in cases] == [
        (Mode.TOPK, 8, False),
        (Mode.TOPK, 8, True),
    ]


def test_acceptance_lengths_are_means_over_rounds_and_times_pair_answers() -> None:
    qa = Measured({TOKEN: [answer(3, 0.2), answer(1, 0.1)], BLOCK: [answer(5, 0.2), answer(2, 0.2, rounds=12)]}, {})
    rag = Measured({TOKEN: [answer(1, 0.1)], BLOCK: [answer(1, 0.1)]}, {})
    rows = {row["case"]: row for row in verification_rows({"qa": [qa], "rag": [rag, rag]})}
    assert list(rows) == ["qa", "rag", ALL]
    assert [row["answers"] for row in rows.values()] == [2, 2, 4]
    assert rows["qa"]["token_acceptance_length"] == 3.0
    assert rows["qa"]["block_acceptance_length"] == 3.75
    assert rows["qa"]["acceptance_length_ratio"] == "1.250 (1.250 to 1.500)"
    assert str(rows["qa"]["reply_ratio"]).startswith("1.500 (1.000 to 2.000")
    assert rows["rag"]["acceptance_length_ratio"] == "1.000 (1.000 to 1.000)"


def test_runs_that_failed_have_no_part_in_the_figures() -> None:
    failed = Measured({TOKEN: [answer(3, 0.2)], BLOCK: []}, {BLOCK: "lost"})
    rows = verification_rows({"qa": [failed]})
    assert rows == [{"case": name, "answers": 0, "failed": "lost"} for name in ("qa", ALL)]


def test_the_order_of_the_cases_alternates_from_seed_to_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one prompt in a category the order within a run never changes."""
    orders: list[list[str]] = []

    class Pair:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> "Pair":
            return self

        def __exit__(self, *_: object) -> None: ...
        def described(self) -> dict[str, str]:
            return {}

        def measure(self, _: object, cases: list[Case], *__: object) -> Measured:
            orders.append([case.name for case in cases])
            return Measured({TOKEN: [answer(1, 0.1)], BLOCK: [answer(1, 0.1)]}, {})

    monkeypatch.setattr(verification_module, "PairRun", Pair)
    done = CliRunner().invoke(app, ["verification", "--bundle", ".", "--target", ".", "--repeats", "3"])
    assert done.exit_code == 0, done.output
    assert orders == [[TOKEN, BLOCK], [BLOCK, TOKEN], [TOKEN, BLOCK]]


@pytest.mark.model
def test_the_command_measures_both_kinds_of_verification(tmp_path: Path) -> None:
    file, prompts = tmp_path / "verification.json", tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"category": "qa", "turns": ["Why is the sky blue?"]}), encoding="utf-8")
    options = ["--prompts", str(prompts), "--repeats", "1", "--max-new-tokens", "24", "--json", str(file)]
    done = CliRunner().invoke(app, ["verification", "--bundle", str(BUNDLE), "--target", str(SAMPLE), *options])
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [(row["case"], row["answers"], row["failed"]) for row in rows] == [("qa", 1, None), (ALL, 1, None)]
