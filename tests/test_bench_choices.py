"""Shares of the draft model's first and second choice, with fake models."""

import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.uplink.choices import choice_row
from bench.uplink.positions import Corpus, Position, collect
from protocol.messages import Sampling
from tests.fakes import FakeDraftModel, FakeTarget, Table, random_table
from tests.sample import BUNDLE, SAMPLE

VOCAB = 64
TABLE = random_table(VOCAB, seed=1)


def corpus(target_table: Table, temperature: float) -> Corpus:
    model, target = FakeDraftModel.make(TABLE), FakeTarget.make(target_table)
    return collect(model, target, [[1, 2], [3, 4]], 4, Sampling(temperature, seed=1), lambda: None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_model_equal_to_the_target_has_no_rejection(temperature: float) -> None:
    row = choice_row(corpus(TABLE, temperature))
    assert (row["positions"], row["first_right"], row["second_right_of_rejected"]) == (64, 1.0, None)


def test_a_target_that_prefers_the_second_choice_rejects_every_first() -> None:
    table = TABLE.copy()
    np.put_along_axis(table, table.argmax(axis=2, keepdims=True), -100.0, axis=2)
    row = choice_row(corpus(table, 0.0))
    assert (row["first_right"], row["second_right"], row["second_right_of_rejected"]) == (0.0, 1.0, 1.0)


def test_above_temperature_zero_choices_are_ranked_with_the_shared_noise() -> None:
    """Without it the few logits that differ by little would decide, and the target's token would be any."""
    positions = corpus(TABLE, 1.0).positions
    raised = [Position(2 * one.logits, one.target_probs, one.index, one.token_id) for one in positions]
    row = choice_row(Corpus(Sampling(1.0, seed=1), raised, 0.0))
    assert 0.3 < cast(float, row["first_right"]) < 1.0
    assert cast(float, row["second_right_of_rejected"]) > 0.3


@pytest.mark.model
def test_the_command_writes_a_row_per_temperature(tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    options = ["--bundle", str(BUNDLE), "--target", str(SAMPLE), "--count", "1", "--rounds", "2"]
    result = CliRunner().invoke(app, ["choices", *options, "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [(row["case"], row["positions"]) for row in rows] == [("ids", 16), ("coupled", 16)]
    assert all(row["first_right"] > 0.7 for row in rows)
