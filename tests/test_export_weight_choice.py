"""--precision auto keeps the format with the highest predicted tokens per second, and says how it compared."""

import io
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from rich.console import Console

from common.round_model import Direction, RoundTimes, expected_tokens, run_tokens
from export import quality, weight_choice
from export.candidates import Built
from export.convert import ConvertSettings, convert
from export.graph import Cache
from export.quality import Continuation, QualityLimits, TeacherForcing
from export.quantize import CANDIDATES, FORMATS, Precision
from export.weight_choice import (
    DRAFTS_AHEAD,
    MAX_DRAFT_LEN,
    Conditions,
    TargetText,
    WeightChoice,
    parse_draft_ms,
    predicted_tokens_per_second,
)
from protocol.bundle import CacheKind, Manifest, QualityFigures
from protocol.errors import QualityError, SettingsError
from tests.screen import CONSOLE
from tests.tiny_source import save_model

VOCAB = 152_000
NAMES = [weights.name for weights in CANDIDATES]
LENGTHS = range(1, MAX_DRAFT_LEN + 1)


def predicted(alpha: float, draft: float, conditions: Conditions = Conditions(), target: float = 0.1) -> float:  # noqa: B008
    return predicted_tokens_per_second((alpha, alpha), draft, target, VOCAB, conditions)


def test_without_a_link_the_prediction_is_the_papers_at_its_best_draft_length() -> None:
    best = max(expected_tokens(0.8, length) / (0.1 + length * 0.02) for length in LENGTHS)
    assert predicted(0.8, 0.02) == pytest.approx(best)


def test_over_a_link_round_trip_airtime_and_drafts_ahead_count() -> None:
    times = RoundTimes(0.02, lambda _: 0.1, 0.2, Direction(token_bytes=18 / 8, bytes_per_second=1e6 / 8))
    in_turn = max(expected_tokens(0.8, length) / times.seconds(length) for length in LENGTHS)
    ahead = max(run_tokens(0.8) / times.run_seconds(0.8, length, DRAFTS_AHEAD) for length in LENGTHS)
    assert predicted(0.8, 0.02, Conditions(rtt_ms=200, up_mbit=1)) == pytest.approx(max(in_turn, ahead))
    assert predicted(0.8, 0.02, Conditions(rtt_ms=200, up_mbit=0.0001)) == pytest.approx(1 / 0.1)


def test_texts_of_both_temperatures_count_alike() -> None:
    both = predicted_tokens_per_second((0.9, 0.5), 0.02, 0.1, VOCAB, Conditions())
    assert both == pytest.approx(2 / (1 / predicted(0.9, 0.02) + 1 / predicted(0.5, 0.02)))


def test_the_faster_draft_wins_on_one_machine_and_the_likelier_one_over_a_long_link() -> None:
    likelier, faster = (0.9, 0.04), (0.85, 0.03)
    assert predicted(*faster) > predicted(*likelier)
    far = Conditions(rtt_ms=200)
    assert predicted(*likelier, far) > predicted(*faster, far)


def test_a_draft_that_does_not_pay_is_predicted_as_the_target_alone() -> None:
    assert predicted(0.0, 10.0) == pytest.approx(1 / 0.1)


@pytest.mark.parametrize(
    "value", ["int4", "int4=", "int4=fast", "int4=0", "int4=-1", "int4=nan", "int4=inf", "int3=5", "=5"]
)
def test_a_draft_time_that_is_not_allowed_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match=r"draft-ms is .*int8, int8-block128, int4, int4-symmetric"):
        parse_draft_ms([value], NAMES)
    assert parse_draft_ms(["int4=12.5", "int8=20"], NAMES) == {"int4": 12.5, "int8": 20.0}
    assert parse_draft_ms(["15", "int4=12.5"], NAMES) == {**dict.fromkeys(NAMES, 15.0), "int4": 12.5}


class FakeBuilt(Built):
    """A candidate whose graph is not loaded."""

    size = 100

    def forcing(self) -> TeacherForcing:
        return cast(TeacherForcing, self)


def built(name: str, agreement: float) -> Built:
    weights = next(one for one in CANDIDATES if one.name == name)
    figures = QualityFigures(agreement, agreement, agreement, agreement, 192)
    return FakeBuilt(weights, Path("none"), Cache(CacheKind.SHARED, 1, 1, 1), figures)


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> WeightChoice:
    """A target that accepts .9 of int8's tokens and .8 of int4's, which drafts in half the time."""

    def acceptance(forcing: TeacherForcing, *_: object) -> float:
        return 0.9 if cast(Built, forcing).weights.precision is Precision.INT8 else 0.8

    def figures(forcing: TeacherForcing, *_: object) -> QualityFigures:
        return replace(cast(Built, forcing).figures, coupled_acceptance=acceptance(forcing))

    monkeypatch.setattr(quality, "argmax_agreement", acceptance)
    monkeypatch.setattr(quality, "measure", figures)
    monkeypatch.setattr(weight_choice, "draft_seconds", lambda forcings, _: [0.05] * len(forcings))
    conditions = Conditions(draft_ms={"int4": 25.0})
    return WeightChoice(TargetText((), (), 0.1), VOCAB, conditions, CONSOLE)


def test_the_fastest_candidate_is_kept_and_the_others_have_a_reason(choice: WeightChoice) -> None:
    int8, int4 = choice.compare([built("int8", 0.99), built("int4", 0.9)])
    assert (int4.reason, int4.draft_milliseconds, int4.greedy_acceptance) == ("", 25.0, 0.8)
    assert int8.draft_milliseconds == 50.0
    assert int8.reason == f"{int8.tokens_per_second / int4.tokens_per_second:.2f} of the best"
    assert int8.tokens_per_second < int4.tokens_per_second


def test_a_candidate_that_fails_the_quality_check_is_not_kept(choice: WeightChoice) -> None:
    int8, int4 = choice.compare([built("int8", 0.99), built("int4", 0.3)])
    assert int8.reason == ""
    assert "argmax_agreement of the exported model is 0.300" in int4.reason
    assert int4.tokens_per_second == 0


def test_without_any_sound_candidate_the_quality_check_fails(choice: WeightChoice) -> None:
    with pytest.raises(QualityError, match="argmax_agreement"):
        choice.compare([built("int8", 0.5), built("int4", 0.3)])


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def test_auto_with_a_target_keeps_the_best_and_stores_the_table(
    draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "LIMITS", dict.fromkeys(Precision, QualityLimits(0, 0)))
    slow = dict.fromkeys(NAMES, 1000.0)
    conditions = Conditions(0, inf, 100.0, {**slow, "int8-block128": 1.0})
    output = io.StringIO()
    manifest = convert(
        str(draft), tmp_path / "bundle", ConvertSettings(precision=None, target=str(draft), conditions=conditions),
        Console(file=output, width=200),
    )  # fmt: skip
    assert [one.weights for one in manifest.candidates] == NAMES
    kept = [one for one in manifest.candidates if not one.reason]
    assert [one.weights for one in kept] == ["int8-block128"]
    assert manifest.precision == "int8"
    assert kept[0].size == sum(record.size for name, record in manifest.files.items() if name.startswith("model"))
    assert kept[0].argmax_agreement == manifest.quality.argmax_agreement
    assert 0 < kept[0].greedy_acceptance <= 1
    assert "int8-block128" in output.getvalue()
    assert Manifest.read(tmp_path / "bundle") == manifest
    manifest.check_files(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_auto_without_a_target_keeps_int8_and_says_what_int4_would_cost(draft: Path, tmp_path: Path) -> None:
    output = io.StringIO()
    manifest = convert(
        str(draft), tmp_path / "bundle", ConvertSettings(precision=None), Console(file=output, width=400)
    )
    assert manifest.precision == "int8"
    assert manifest.candidates == ()
    assert "int8 is kept: int4 would take " in output.getvalue()
    assert f"instead of {manifest.quality.coupled_acceptance:.3f} at 1" in output.getvalue()
    assert convert(str(draft), tmp_path / "int8", ConvertSettings(precision=Precision.INT8), CONSOLE) == manifest


@pytest.mark.parametrize("length", [1, 3, 64])
def test_drafting_is_timed_in_turns_of_equal_length_however_short_the_text_is(length: int) -> None:
    order: list[str] = []
    lengths: list[int] = []

    class Forcing:
        def __init__(self, name: str) -> None:
            self.name = name

        def logits(self, expected: Continuation) -> "list[int]":
            order.append(self.name)
            lengths.append(len(expected.token_ids))
            return expected.token_ids

    forcings = [cast(TeacherForcing, Forcing(name)) for name in "ab"]
    text = [Continuation([1, 2], list(range(1, 1 + length)), np.empty((length, 8)))]
    seconds = weight_choice.draft_seconds(forcings, text)
    assert order == ["a", "b"] * weight_choice.TURNS
    assert min(lengths) == max(lengths) > weight_choice.TURN_TOKENS
    assert len(seconds) == 2
    assert min(seconds) >= 0


def test_every_precision_has_one_format_and_candidates_have_names_of_their_own() -> None:
    assert set(FORMATS) == set(Precision)
    assert len(set(NAMES)) == len(NAMES)
