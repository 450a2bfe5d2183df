"""Manifests: what is written is read back; an old format version is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from protocol.bundle import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    MODEL_NAME,
    TOKENIZER_NAME,
    Candidate,
    FileRecord,
    Manifest,
    Origin,
)
from protocol.errors import BundleError
from tests.fakes import manifest


def altered(folder: Path, **changes: Any) -> None:
    """Write a manifest with these values changed; None removes a key."""
    manifest(12).write(folder)
    path = folder / MANIFEST_NAME
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(
        json.dumps({key: value for key, value in values.items() if value is not None or key not in changes}),
        encoding="utf-8",
    )


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = FileRecord(7, 64 * "a")
    written = replace(
        manifest(12, stop_ids=(2, 5)),
        files={MODEL_NAME: record, TOKENIZER_NAME: record},
        origin=Origin("Someone/Model", "apache-2.0", {"onnx": "1.2"}),
        candidates=(
            Candidate("int8", 7, 0.9, 0.9, 0.8, 0.7, 12.5, 20.0),
            Candidate("int4", 4, 0, 0, 0, 0, 1, 1, "slow"),
        ),
    )
    written.write(tmp_path)
    assert Manifest.read(tmp_path) == written


def test_a_manifest_of_the_format_before_origins_is_read(tmp_path: Path) -> None:
    record = FileRecord(7, 64 * "a")
    files = {name: vars(record) for name in (MODEL_NAME, TOKENIZER_NAME)}
    altered(tmp_path, format_version=3, origin=None, candidates=None, files=files)
    found = Manifest.read(tmp_path)
    assert (found.origin, found.candidates) == (Origin(), ())


@pytest.mark.parametrize("version", [1, 2])
def test_an_old_format_version_is_refused_with_export_again(version: int, tmp_path: Path) -> None:
    figures = json.loads(json.dumps(vars(manifest(12).quality)))
    altered(tmp_path, format_version=version, quality=None, gate=figures)
    with pytest.raises(BundleError, match=rf"format_version is {version}; allowed: 3, 4, 5, 6; export .*again"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "format_version is"),
        ({"format_version": None}, "format_version is None"),
        ({"quality": None}, "the manifest has no quality"),
        ({"cache_kind": "magic"}, "magic"),
    ],
)
def test_a_damaged_manifest_is_refused_with_export_again(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    altered(tmp_path, **changes)
    with pytest.raises(BundleError, match=rf"{match}.*export .*again"):
        Manifest.read(tmp_path)
