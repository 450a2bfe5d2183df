"""inspect tells what a bundle is and which targets it fits; verify refuses one that would not work."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from export.cli import app
from export.convert import ConvertSettings, convert
from export.inspection import verify
from export.model_card import Provenance, write_model_card
from export.quantize import Precision
from protocol.bundle import Candidate, FileRecord, Manifest
from protocol.errors import BundleError, QualityError
from tests.sample import PROJECT
from tests.screen import CONSOLE
from tests.tiny_bundle import one_word, write_bundle
from tests.tiny_source import save_model, save_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("models") / "tiny")
    write_model_card(folder, Provenance("Someone/Tiny", "apache-2.0"), "A model.")
    return folder


@pytest.fixture(scope="module")
def bundle(source: Path) -> Path:
    convert(str(source), source.parent / "bundle", ConvertSettings(precision=Precision.INT8), CONSOLE)
    return source.parent / "bundle"


def inspected(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_origin_licence_quality_sizes_and_fitting_targets_are_shown(bundle: Path, source: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other")
    save_tokenizer(other, ["<s>", "</a>"])
    shown = inspected(bundle, source, other)
    manifest = Manifest.read(bundle)
    for text in (
        "Someone/Tiny",
        "apache-2.0",
        f"transformers {manifest.origin.versions['transformers']}",
        f"argmax agreement {manifest.quality.argmax_agreement:.3f}",
        f"tokenizer.json {manifest.files['tokenizer.json'].size / 1e6:.1f} MB",
        manifest.vocabulary_hash,
        f"{source}: fits",
        f"{other}: does not fit, id 1 is '</s>' in the bundle and '</a>' in the target",
    ):
        assert text in shown
    report = json.loads(inspected(bundle, other, "--json"))
    assert report["origin"]["licence"] == "apache-2.0"
    assert [fit["fits"] for fit in report["targets"]] == [False]


def test_a_target_fits_where_the_bundles_tokens_are_its_first(bundle: Path, source: Path, tmp_path: Path) -> None:
    """As a base station decides at Hello: a target may have further tokens, not fewer."""
    manifest, more = Manifest.read(bundle), save_model(tmp_path / "more")
    tokens = manifest.vocab_size
    assert save_tokenizer(more, more=["cat", "dog"]) == tokens + 2
    assert f"{more}: fits" in inspected(bundle, more)
    larger = tmp_path / "larger"
    larger.mkdir()
    shutil.copy(more / "tokenizer.json", larger)
    replace(manifest, vocab_size=tokens + 2).write(larger)
    shown = inspected(larger, more, source)
    assert f"{more}: fits" in shown
    assert f"{source}: does not fit, {tokens + 2:,} tokens in the bundle, {tokens:,} in the target" in shown


def test_texts_of_a_manifest_are_no_markup(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", one_word("cat"))
    found = Manifest.read(folder)
    candidate = Candidate("[red]int8", 1, 1, 1, 1, 1, 1, 1, "[/]")
    replace(found, origin=replace(found.origin, model="[bold]x[/nothing]"), candidates=(candidate,)).write(folder)
    shown = inspected(folder)
    assert "[bold]x[/nothing]" in shown
    assert "[red]int8" in shown


def test_a_sound_bundle_is_verified(bundle: Path) -> None:
    assert verify(bundle) == Manifest.read(bundle)


def _truncate(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1])


def _contradict(folder: Path) -> None:
    replace(Manifest.read(folder), layers=2).write(folder)


def _claim_more_tokens(folder: Path) -> None:
    replace(Manifest.read(folder), vocab_size=99).write(folder)


@pytest.mark.parametrize("damage", [_truncate, _contradict, _claim_more_tokens])
def test_a_bundle_that_differs_from_its_manifest_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", one_word("cat"))
    verify(folder)
    damage(folder)
    with pytest.raises(BundleError, match="again"):
        verify(folder)


def test_a_graph_that_computes_nan_is_refused_although_its_hash_is_right(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", np.full_like(one_word("cat"), np.nan))
    with pytest.raises(QualityError, match="NaN or infinite"):
        verify(folder)


def test_the_same_input_gives_the_same_bytes(source: Path, bundle: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "again", ConvertSettings(precision=Precision.INT8), CONSOLE)
    first, second = (
        {path.name: FileRecord.of(path) for path in folder.iterdir()} for folder in (bundle, tmp_path / "again")
    )
    assert first == second


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_leaves_no_partial_bundle(
    source: Path, tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    command = [sys.executable, "-m", "export", "convert", str(source), str(tmp_path / "bundle")]
    with subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "stop ids" in process.stderr.readline()  # it converts now
        assert list(tmp_path.iterdir())
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == exit_code
    assert rest.endswith("interrupted\n") == (number == signal.SIGINT)
    assert "Traceback" not in rest
    assert not list(tmp_path.iterdir())
