"""Prompt lookup on recorded texts, in simulated time: it gains where text repeats, and costs little elsewhere."""

import json
import random
from pathlib import Path
from statistics import median

import pytest
from typer.testing import CliRunner

from device.drafting.sampling import coupled_token
from protocol.messages import Sampling
from tests.fakes import FakeDraftModel, random_table
from tests.planner_texts import LINKS, RecordedText, app, lookup_ratios, recorded

LENGTH = 64
AHEAD = pytest.mark.parametrize("drafts_ahead", [0, None])


def random_text(seed: int, ids: int, repeats: bool = False) -> RecordedText:
    """A text over some ids, of which the draft model gets four of five right; perhaps its prompt holds the answer."""
    chance = random.Random(seed)  # noqa: S311
    answer = [chance.randrange(1, ids) for _ in range(LENGTH)]
    right = [chance.random() < 0.8 for _ in answer]
    margins = tuple(chance.uniform(0.3, 3.0) if one else chance.uniform(0.02, 1.0) for one in right)
    drafted = tuple(token if one else 0 for token, one in zip(answer, right, strict=True))
    prompt = (*range(1, 40), *(answer if repeats else ()), 1, 2)
    return RecordedText("random", prompt, tuple(answer), drafted, margins)


@AHEAD
@pytest.mark.parametrize("ids", [8, 24])
def test_lookup_costs_little_where_what_followed_before_tells_nothing(drafts_ahead: int | None, ids: int) -> None:
    ratios = lookup_ratios([random_text(seed, ids) for seed in range(6)], LINKS["pair"], drafts_ahead)
    with_model, _, alone = (median(one) for one in zip(*ratios, strict=True))
    assert with_model >= 0.98
    assert alone >= 0.98


@AHEAD
def test_lookup_gains_where_the_prompt_holds_the_answer(drafts_ahead: int | None) -> None:
    texts = [random_text(seed, 1000, repeats=True) for seed in range(4)]
    ratios = lookup_ratios(texts, LINKS["pair"], drafts_ahead)
    with_model, foreseen, alone = (median(one) for one in zip(*ratios, strict=True))
    assert foreseen > with_model > 1.5
    assert alone > 3


def test_a_recording_has_what_the_draft_model_proposes_at_each_position() -> None:
    table = random_table(16, seed=1, sharpness=3.0)
    text = recorded("qa", [1, 2], [3, 4, 5], FakeDraftModel.make(table))
    model = FakeDraftModel.make(table)
    rows = [model.forward(ids) for ids in ([1, 2], [3], [4])]
    assert text.drafted_ids == tuple(int(row.argmax()) for row in rows)
    assert text.margins == tuple(coupled_token(row, Sampling(), 2 + index)[1] for index, row in enumerate(rows))


def test_the_command_prints_each_link_and_category(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps(vars(random_text(seed, 24)) | {"category": name}) for seed, name in enumerate(["qa", "rag"])]
    file.write_text("\n".join(lines), encoding="utf-8")
    done = CliRunner().invoke(app, ["simulate", str(file)])
    assert done.exit_code == 0, done.output
    assert done.output.count("| rag |") == 2 * len(LINKS)


def test_a_missing_recording_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["simulate", str(tmp_path / "none.jsonl")])
    assert done.exit_code == 2
    assert "does not exist" in done.output
