"""The base station finds the stop ids and tokens of a model where the export finds them."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from basestation.target.pretrained import _gguf_vocabulary
from basestation.target.target_model import TargetModel
from common.gguf_metadata import GgufVocabulary
from common.stop_ids import all_stop_ids
from export.gguf_tokenizer import gguf_tokenizer
from export.source import load_tokenizer, stop_sources_of
from protocol.vocabulary import vocabulary_hash, vocabulary_size
from tests.gguf_files import byte_level_file, sentencepiece_file
from tests.test_export_gguf_tokenizer import SPACED, trained
from tests.tiny_source import save_model, save_tokenizer


def test_a_chatml_target_whose_configuration_names_another_token_stops_at_the_end_of_its_turn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(tmp_path / "model", eos_token_id=0)
    save_tokenizer(folder, ["<s>", "</s>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    with caplog.at_level(logging.INFO, logger="basestation.target.pretrained"):
        target = TargetModel.load(str(folder), "float32", "cpu", "16MiB")
    assert target.vocabulary.stop_ids == all_stop_ids(stop_sources_of(folder, load_tokenizer(folder))) == {0, 3}
    assert "stop ids [0, 3], from config.json: [0]; generation_config.json: [0]; tokenizer: [3]" in caplog.text


def test_of_the_several_chat_templates_of_a_target_the_default_tells_the_end_of_a_turn(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    save_tokenizer(folder, ["<s>", "</s>", "<stop>"])
    tokenizer = load_tokenizer(folder)
    template = "{% for m in messages %}{{ m['content'] }}<stop>{% endfor %}"
    tokenizer.chat_template = {"default": template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    assert TargetModel.load(str(folder), "float32", "cpu", "16MiB").vocabulary.stop_ids == {1, 2}
    assert all_stop_ids(stop_sources_of(folder, load_tokenizer(folder))) == {1, 2}


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_gguf_target_has_the_tokens_of_a_draft_that_is_exported_from_the_same_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if kind == "byte-level":
        byte_level_file(path, eot_token_id=3)
    else:
        sentencepiece_file(path, trained(SPACED, add_dummy_prefix=False))
    model = SimpleNamespace(get_output_embeddings=lambda: nn.Embedding(512, 1))
    vocabulary = _gguf_vocabulary(path, model)
    draft = gguf_tokenizer(GgufVocabulary.read(path)).get_vocab()
    assert vocabulary.used_size == vocabulary_size(draft)
    assert vocabulary.hash_of_first(vocabulary.used_size).hex() == vocabulary_hash(draft)
    assert len(vocabulary.stop_ids) == 2
