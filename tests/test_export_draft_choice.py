"""Of several draft models the fastest with the target is kept."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from export import draft_choice
from export.convert import ConvertSettings
from export.draft_choice import convert_fastest
from export.quantize import Precision
from export.weight_choice import Conditions
from protocol.bundle import Candidate, Manifest
from protocol.errors import ModelError, SettingsError
from tests.tiny_bundle import one_word, write_bundle

SPEEDS = {"slow": 10.0, "fast": 30.0, "other": 20.0}
AUTO = ConvertSettings(precision=None, target="target")


@pytest.fixture(autouse=True)
def conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(model: str, bundle: Path, settings: ConvertSettings, console: Console) -> Manifest:
        if model not in SPEEDS:
            raise ModelError(f"{model!r} does not exist")
        write_bundle(bundle, one_word("cat"))
        best = Candidate("int8", 1, 1, 1, 1, 1, 1, SPEEDS[model])
        other = replace(best, tokens_per_second=99.0, reason="fails the quality check")
        manifest = replace(Manifest.read(bundle), name=model, candidates=(other, best))
        manifest.write(bundle)
        return manifest

    monkeypatch.setattr(draft_choice, "convert", convert)


def test_the_fastest_is_kept_and_all_are_named(tmp_path: Path) -> None:
    output = io.StringIO()
    manifest = convert_fastest(list(SPEEDS), tmp_path / "new" / "bundle", AUTO, Console(file=output))
    assert manifest.name == "fast"
    assert Manifest.read(tmp_path / "new" / "bundle") == manifest
    manifest.check_files(tmp_path / "new" / "bundle")
    assert output.getvalue().splitlines()[-3:] == [
        "slow: 10.0 tokens/s", "fast: 30.0 tokens/s: kept", "other: 20.0 tokens/s"
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_without_a_target_or_with_one_format_nothing_tells_which_is_fastest(tmp_path: Path) -> None:
    for settings in (replace(AUTO, target=None), replace(AUTO, precision=Precision.INT8)):
        with pytest.raises(SettingsError, match="one, or several with --target and --precision auto"):
            convert_fastest(list(SPEEDS), tmp_path / "bundle", settings, Console(file=io.StringIO()))


def test_the_time_of_one_draft_model_is_not_taken_for_another(tmp_path: Path) -> None:
    settings = replace(AUTO, conditions=Conditions(draft_ms={"int8": 15.0}))
    with pytest.raises(SettingsError, match=r"draft-ms is 'int8=15'; allowed: one MODEL: .*singly"):
        convert_fastest(list(SPEEDS), tmp_path / "bundle", settings, Console(file=io.StringIO()))


def test_a_draft_model_that_cannot_be_converted_leaves_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'none' does not exist"):
        convert_fastest(["fast", "none"], tmp_path / "bundle", AUTO, Console(file=io.StringIO()))
    assert list(tmp_path.iterdir()) == []
