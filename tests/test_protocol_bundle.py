"""Any file in place of a manifest is read, or refused with what is wrong; nothing outside the manifest is loaded."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.drafting.draft_model import DraftModel
from device.text.tokenizer import Tokenizer
from protocol.bundle import (
    CHAT_TEMPLATE_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    TOKENIZER_NAME,
    Candidate,
    FileRecord,
    Manifest,
)
from protocol.errors import BundleError, SettingsError
from tests.fakes import manifest
from tests.tiny_bundle import VOCAB, one_word, write_bundle

RECORD = FileRecord(3, 64 * "0")
VALID: dict[str, Any] = json.loads(
    json.dumps(asdict(replace(manifest(12, (2,)), files={MODEL_NAME: RECORD, TOKENIZER_NAME: RECORD})))
)
CANDIDATE = asdict(Candidate("int8", 7, 0.9, 0.9, 0.8, 0.7, 12.5, 20.0))
INTEGERS = ["vocab_size", "context_length", "layers", "kv_heads", "head_size"]
TEXTS = ["name", "architecture", "converter", "precision", "cache_kind", "vocabulary_hash", "bos_token", "eos_token"]
SHARES = ["argmax_agreement", "overlap", "topk_acceptance", "coupled_acceptance"]
NOT_A_COUNT: list[Any] = [None, True, 0, -1, 1.0, "1", [], {}, float("nan"), float("inf"), 2**31, 10**400]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.sampled_from(["shared", 3]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=9), children, max_size=3),
    max_leaves=8,
)


def read(text: str | bytes) -> Manifest:
    """Read a manifest with this content."""
    with TemporaryDirectory() as folder:
        Path(folder, MANIFEST_NAME).write_bytes(
            text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        )
        return Manifest.read(Path(folder))


def refused(content: str | bytes) -> str:
    with pytest.raises(BundleError, match=r"export .*again$") as caught:
        read(content)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def changed(path: str, value: Any) -> str:
    """The valid manifest with the value at a dotted path replaced."""
    values = json.loads(json.dumps(VALID))
    *parents, last = path.split("/")
    inner = values
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return json.dumps(values)


def test_the_manifest_that_the_other_tests_change_is_valid() -> None:
    assert read(json.dumps(VALID)).files == {MODEL_NAME: RECORD, TOKENIZER_NAME: RECORD}


@pytest.mark.parametrize("content", ["[]", "7", "null", '"text"', "true", "NaN", '[{"format_version": 3}]'])
def test_a_manifest_that_is_no_object_is_refused(content: str) -> None:
    assert "allowed: a JSON object" in refused(content)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{", 100_000 * b"[", 100_000 * b'{"a":', b'{"a":' + 5000 * b"9" + b"}"],
)
def test_a_manifest_that_is_no_json_is_refused(content: bytes) -> None:
    refused(content)


@pytest.mark.parametrize("name", [name for name in VALID if name != "format_version"])
def test_every_field_is_required_and_of_one_type(name: str) -> None:
    values = {key: value for key, value in VALID.items() if key != name}
    assert f"has no {name}" in refused(json.dumps(values))
    values_of_other_types: list[Any] = [True, 1.5, float("nan"), [[]], [None], "\ud800"]
    for value in values_of_other_types if name == "draft_vocabulary" else [None, *values_of_other_types]:
        assert name in refused(changed(name, value))
    assert "has the unknown field 'news'" in refused(json.dumps(VALID | {"news": 1}))


@pytest.mark.parametrize("value", NOT_A_COUNT)
@pytest.mark.parametrize("name", [*INTEGERS, "quality/positions"])
def test_a_count_is_a_positive_integer(name: str, value: Any) -> None:
    assert f"{name.rpartition('/')[2]} is {str(value)[:5]}" in refused(changed(name, value)).replace("'", "")


@pytest.mark.parametrize("value", [7, [], {}, True, None])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_a_string(name: str, value: Any) -> None:
    assert f"{name} is {value!r}" in refused(changed(name, value))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), True, "1", None])
@pytest.mark.parametrize("name", SHARES)
def test_a_share_is_in_0_to_1(name: str, value: Any) -> None:
    assert f"quality: {name} is {value!r}; allowed: 0 to 1" in refused(changed(f"quality/{name}", value))


@pytest.mark.parametrize("value", [-1, True, 1.0, float("nan"), "3", None, [3]])
def test_a_file_size_is_a_number_of_bytes(value: Any) -> None:
    assert f"files.{MODEL_NAME}: size is {value!r}" in refused(changed(f"files/{MODEL_NAME}/size", value))


@pytest.mark.parametrize("value", ["", 63 * "0", 64 * "g", 64 * "F", 64, None, [64 * "0"]])
@pytest.mark.parametrize("name", ["vocabulary_hash", f"files/{MODEL_NAME}/sha256"])
def test_a_hash_is_64_hexadecimal_digits(name: str, value: Any) -> None:
    assert "allowed: 64 hexadecimal digits" in refused(changed(name, value))


@pytest.mark.parametrize("value", [[-1], [True], [2.0], ["2"], [None], [[2]], [2**31], 2, "2", {"2": 2}])
def test_stop_ids_are_a_list_of_ids(value: Any) -> None:
    assert "stop_ids is " in refused(changed("stop_ids", value))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), True, "1", None])
@pytest.mark.parametrize("name", ["draft_milliseconds", "tokens_per_second"])
def test_a_measure_is_finite_and_not_negative(name: str, value: Any) -> None:
    assert f"candidates.0: {name} is {value!r}" in refused(changed("candidates", [CANDIDATE | {name: value}]))


@pytest.mark.parametrize("value", [{"onnx": 1}, {"onnx": None}, ["1.0"], "1.0"])
def test_versions_are_texts(value: Any) -> None:
    assert "origin: versions is " in refused(changed("origin/versions", value))


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        "../model.onnx",
        "a/b",
        "/etc/passwd",
        "a\\b",
        "..\\model.onnx",
        "C:\\x",
        "a\0b",
        MANIFEST_NAME,
        "a/",
    ],
)
def test_a_listed_name_is_a_file_of_the_bundles_own_folder(name: str) -> None:
    values = VALID | {"files": {**VALID["files"], name: asdict(RECORD)}}
    assert f"files lists {name!r}; allowed: names of files in the bundle's folder" in refused(json.dumps(values))


@pytest.mark.parametrize("files", [{}, {MODEL_NAME: asdict(RECORD)}, {TOKENIZER_NAME: asdict(RECORD)}])
def test_model_and_tokenizer_are_listed(files: dict[str, Any]) -> None:
    assert "files lists no " in refused(changed("files", files))


@given(json_values)
def test_any_json_is_refused_or_read(value: Any) -> None:
    read_or_refused(json.dumps(value))


@given(
    st.sampled_from([*VALID, *(f"quality/{name}" for name in SHARES), f"files/{MODEL_NAME}", "origin/versions"]),
    json_values,
)
def test_any_value_of_any_field_is_refused_or_read(path: str, value: Any) -> None:
    read_or_refused(changed(path, value))


def read_or_refused(content: str) -> None:
    try:
        found = read(content)
    except BundleError:
        return
    assert isinstance(found, Manifest)
    assert len(bytes.fromhex(found.vocabulary_hash)) == 32
    assert {MODEL_NAME, TOKENIZER_NAME} <= set(found.files)


def test_a_manifest_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(BundleError, match="cannot be read"):
        Manifest.read(tmp_path)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", one_word("cat"))


def test_a_sound_bundle_is_loaded(bundle: Path) -> None:
    model = DraftModel(bundle)
    assert model.forward([0, 1]).argmax() == 2
    assert Tokenizer(bundle, model.manifest).encode_chat([{"role": "user", "content": "the cat"}]) == [0, 2]


def _truncate(bundle: Path) -> None:
    path = bundle / MODEL_NAME
    path.write_bytes(path.read_bytes()[:-1])


def _change(bundle: Path) -> None:
    path = bundle / TOKENIZER_NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _delete(bundle: Path) -> None:
    (bundle / CHAT_TEMPLATE_NAME).unlink()


def _add_weights(bundle: Path) -> None:
    (bundle / f"{MODEL_NAME}.data").write_bytes(b"weights")


def _replace_by_folder(bundle: Path) -> None:
    (bundle / MODEL_NAME).unlink()
    (bundle / MODEL_NAME).mkdir()


@pytest.mark.parametrize("damage", [_truncate, _change, _delete, _add_weights, _replace_by_folder])
def test_files_that_differ_from_the_manifest_are_refused(damage: Callable[[Path], None], bundle: Path) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=r"has \d+ bytes|another SHA-256|is missing|is not listed"):
        DraftModel(bundle)


def without(bundle: Path, name: str) -> Manifest:
    """The manifest without one listed file, written in place of the old one."""
    found = Manifest.read(bundle)
    found = replace(found, files={listed: record for listed, record in found.files.items() if listed != name})
    found.write(bundle)
    return found


def test_a_chat_template_that_is_not_listed_is_not_loaded(bundle: Path) -> None:
    found = without(bundle, CHAT_TEMPLATE_NAME)
    DraftModel(bundle)
    with pytest.raises(SettingsError, match="this bundle has no chat template"):
        Tokenizer(bundle, found).encode_chat([{"role": "user", "content": "the cat"}])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kv_heads": 2}, "has kv_heads 1; the manifest says 2"),
        ({"head_size": 64}, "has head_size 1; the manifest says 64"),
        ({"vocab_size": VOCAB + 1}, f"has {VOCAB} logits; the manifest says {VOCAB + 1} tokens"),
    ],
)
def test_a_graph_that_contradicts_the_manifest_is_refused(changes: dict[str, Any], match: str, bundle: Path) -> None:
    replace(Manifest.read(bundle), **changes).write(bundle)
    with pytest.raises(BundleError, match=match):
        DraftModel(bundle)
