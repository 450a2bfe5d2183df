"""Tokens of two vocabularies are mapped by their bytes; a wrong map is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common.token_bytes import TokenBytes
from common.vocabulary_map import ABSENT, SHARPENING, VocabularyMap
from protocol.bundle import DRAFT_TOKENIZER_NAME, TOKENIZER_NAME, VOCABULARY_MAP_NAME
from protocol.errors import BundleError, MismatchError, ModelError
from tests.vocabulary_pairs import END, TARGET, TARGET_SIZE, TARGET_TEXTS, bridged, draft_manifest, draft_tokens

EVERYTHING = "Größe: 東京 🐑\n\tif x:\n        return  1\r\n"


def byte_level(path: Path, words: list[str]) -> Path:
    """A byte-level tokenizer with ``words`` beside the bytes, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([*words, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(path))
    return path


def sentence_piece(path: Path, words: list[str]) -> Path:
    """A tokenizer as SentencePiece with byte fallback has it."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(path))
    return path


def test_the_bytes_of_byte_level_tokens_are_those_that_the_library_decodes(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "tokenizer.json", ["Ġthe", "Ċ"])
    tokens = TokenBytes.read(path, 10_000, "", "")
    ids = Tokenizer.from_file(str(path)).encode(EVERYTHING, add_special_tokens=False).ids
    assert b"".join(tokens.ordinary[token_id] for token_id in ids) == EVERYTHING.encode()
    assert sorted(content for content in tokens.ordinary.values() if len(content) == 1)[-1] == b"\xff"
    assert tokens.ordinary[0] == b" the"
    assert list(tokens.special) == ["<|im_end|>"]


def test_tokens_of_both_kinds_meet_by_their_bytes_and_special_ones_by_role(tmp_path: Path) -> None:
    target = TokenBytes.read(byte_level(tmp_path / "a.json", ["Ġthe", "æĿ±äº¬"]), 10_000, "", "<|im_end|>")
    draft = TokenBytes.read(sentence_piece(tmp_path / "b.json", ["▁the", "東京", "▁"]), 10_000, "", "</s>")
    found = VocabularyMap.build(target, draft, 500)
    assert found.spelling(0) == (258,)
    assert found.spelling(1) == (259,)
    space = next(token_id for token_id, content in target.ordinary.items() if content == b" ")
    assert found.spelling(space) == (260,), "not the token of the byte, which stands for characters without a token"
    assert found.spelling(target.special["<|im_end|>"]) == (draft.special["</s>"],)


def test_tokens_that_are_no_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##re": 2}, unk_token="[UNK]")).save(str(path))  # noqa: S106
    with pytest.raises(ModelError, match="type WordPiece, do not stand for bytes; allowed: byte-level BPE"):
        TokenBytes.read(path, 10, "", "")
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be used"):
        TokenBytes.read(path, 10, "", "")


@pytest.mark.parametrize("common", [1, 5, len(TARGET_TEXTS)])
def test_every_token_is_spelled_with_its_own_bytes(common: int) -> None:
    tokens = draft_tokens(common)
    found = VocabularyMap.build(TARGET, tokens, TARGET_SIZE)
    for token_id, content in TARGET.ordinary.items():
        assert b"".join(tokens.ordinary[one] for one in found.spelling(token_id)) == content
    assert found.spelling(TARGET_SIZE + 9) == ()
    assert found.common_tokens == np.count_nonzero(found.draft_ids != ABSENT)


def test_a_byte_that_no_text_has_need_not_be_spelled() -> None:
    target = TokenBytes({0: b"a\x04", 1: b"\xff", 2: b"a"}, {})
    found = VocabularyMap.build(target, TokenBytes({7: b"a"}, {}), 3)
    assert [found.spelling(token_id) for token_id in range(3)] == [(7,), (), (7,)]


def test_a_byte_of_text_that_the_draft_model_lacks_is_named() -> None:
    with pytest.raises(MismatchError, match="no token for the byte 0x09, which the target's tokens contain"):
        VocabularyMap.build(TARGET, TokenBytes({0: b"a"}, {}), TARGET_SIZE)


@pytest.mark.parametrize(
    ("token_id", "draft_id"), [(0, 0), (3, 1), (END, 0), (0, 999), (0, -7), (2, len(draft_tokens(3).ordinary))]
)
def test_a_map_to_a_token_of_other_bytes_is_refused(token_id: int, draft_id: int) -> None:
    tokens = draft_tokens(3)
    draft_ids = VocabularyMap.build(TARGET, tokens, TARGET_SIZE).draft_ids
    draft_ids[token_id] = draft_id
    with pytest.raises(BundleError, match=f"the target's token {token_id} .* draft model's {draft_id} "):
        VocabularyMap(draft_ids, TARGET, tokens)


def written_bundle(folder: Path) -> tuple[Any, Any]:
    """The files that a map is read from, and the map."""
    target = byte_level(folder / TOKENIZER_NAME, ["Ġthe", "Ġa"])
    draft = byte_level(folder / DRAFT_TOKENIZER_NAME, ["Ġa", "Ġthe"])
    own = draft_manifest(0)
    size = len(json.loads(target.read_text(encoding="utf-8"))["model"]["vocab"])
    manifest = type(own)(**{**vars(own), "vocab_size": size, "eos_token": "<|im_end|>"})
    vocabulary = type(own.draft_vocabulary)(  # type: ignore[misc]
        **{**vars(own.draft_vocabulary), "vocab_size": size, "eos_token": "<|im_end|>"}
    )
    tokens = [TokenBytes.read(path, size, "", "<|im_end|>") for path in (target, draft)]
    found = VocabularyMap.build(tokens[0], tokens[1], size)
    found.write(folder / VOCABULARY_MAP_NAME)
    return (manifest, vocabulary), found


def test_a_map_is_read_as_it_was_written(tmp_path: Path) -> None:
    (manifest, vocabulary), written = written_bundle(tmp_path)
    found = VocabularyMap.read(tmp_path, manifest, vocabulary)
    assert (found.draft_ids == written.draft_ids).all()
    assert found.draft_ids[:2].tolist() == [1, 0]


@pytest.mark.parametrize("fault", ["swapped", "short", "another type", "no array", "missing"])
def test_a_wrong_or_damaged_map_is_refused_when_it_is_read(fault: str, tmp_path: Path) -> None:
    (manifest, vocabulary), written = written_bundle(tmp_path)
    path, ids = tmp_path / VOCABULARY_MAP_NAME, written.draft_ids
    if fault == "swapped":
        ids[[0, 1]] = ids[[1, 0]]
        np.save(path, ids)
    elif fault == "no array":
        path.write_bytes(b"text")
    elif fault == "missing":
        path.unlink()
    else:
        np.save(path, ids[:-1] if fault == "short" else ids.astype(np.int64))
    with pytest.raises(BundleError, match="export the bundle again"):
        VocabularyMap.read(tmp_path, manifest, vocabulary)


def test_the_logits_are_the_draft_models_by_target_id_sharpened() -> None:
    bridge, tokens = bridged(4)
    found = VocabularyMap.build(TARGET, tokens, TARGET_SIZE)
    logits = np.arange(bridge.manifest.graph_tokens, dtype=np.float32)
    by_target = found.target_logits(logits)
    for token_id, draft_id in enumerate(found.draft_ids.tolist()):
        assert by_target[token_id] == (-np.inf if draft_id == ABSENT else SHARPENING * draft_id)
