"""The check of the text side of a bundle refuses a tokenizer or a chat template that would change answers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.chat_template import ChatTemplate
from common.gguf_metadata import GgufVocabulary, TokenType
from export.gguf_tokenizer import gguf_tokenizer
from export.tokenizer_check import check_template, check_tokenizer, check_tokens
from protocol.errors import QualityError
from tests.gguf_files import BYTES, CHATML, byte_level_file, sentencepiece_file
from tests.test_export_gguf_tokenizer import SPACED, trained

WORDS = ["Ġh", "he", "hel", "hell", "hello", "wo", "wor"]
MERGES = [("Ġ", "h"), ("h", "e"), ("he", "l"), ("hel", "l"), ("hell", "o"), ("w", "o"), ("wo", "r")]


def byte_level() -> Tokenizer:
    """Bytes, a few words and a control token."""
    vocabulary = {token: token_id for token_id, token in enumerate([*BYTES, *WORDS, "<|im_end|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_tokenizer_that_agrees_with_itself_passes(tmp_path: Path) -> None:
    check_tokenizer(saved(byte_level(), tmp_path))
    for add_dummy_prefix in (True, False):
        proto = trained([] if add_dummy_prefix else SPACED, add_dummy_prefix=add_dummy_prefix)
        vocabulary = GgufVocabulary.read(sentencepiece_file(tmp_path / "one.gguf", proto))
        check_tokenizer(saved(gguf_tokenizer(vocabulary).backend_tokenizer, tmp_path))
    padded = GgufVocabulary.read(byte_level_file(tmp_path / "padded.gguf"))
    check_tokenizer(saved(gguf_tokenizer(padded).backend_tokenizer, tmp_path))


def test_an_added_token_that_does_not_encode_to_itself_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Replace("#", "%")
    tokenizer.add_tokens([AddedToken("#think", normalized=True), AddedToken("%think", normalized=True)])
    with pytest.raises(QualityError, match=r"the token '[#%]think' encodes to \[26\d\]; allowed: its id, 26\d; use"):
        check_tokenizer(saved(tokenizer, tmp_path))


def test_a_control_token_of_a_file_that_is_cut_into_pieces_is_refused(tmp_path: Path) -> None:
    vocabulary = GgufVocabulary.read(byte_level_file(tmp_path / "one.gguf"))
    check_tokens(gguf_tokenizer(vocabulary).backend_tokenizer, vocabulary.added_tokens)
    without_types = replace(vocabulary, types=[TokenType.NORMAL] * len(vocabulary.tokens))
    with pytest.raises(QualityError, match=r"the token '<tool_call>' encodes to \[.*, .*\]; allowed: its id, 260; use"):
        check_tokens(gguf_tokenizer(without_types).backend_tokenizer, vocabulary.added_tokens)


def lower_cased(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


def no_decoder(tokenizer: Tokenizer) -> None:
    tokenizer.decoder = None


def doubled(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Prepend("a")


@pytest.mark.parametrize("change", [lower_cased, no_decoder, doubled])
def test_tokens_whose_text_encodes_otherwise_are_refused(change: Callable[[Tokenizer], None], tmp_path: Path) -> None:
    tokenizer = byte_level()
    change(tokenizer)
    with pytest.raises(QualityError, match=r"0\.\d\d of the tokens encode to themselves; allowed: 0\.9 or more; use"):
        check_tokenizer(saved(tokenizer, tmp_path))


def with_template(template: str) -> PreTrainedTokenizerFast:
    names = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **names)
    tokenizer.chat_template = template
    return tokenizer


def check(shipped: str, source: str) -> None:
    check_template(ChatTemplate(shipped, {"bos_token": "", "eos_token": "<|im_end|>"}), with_template(source))


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}"
        "{% endfor %}",
        "{{ strftime_now('%d %b %Y') }}{{ messages | tojson }}{% generation %}{{ eos_token }}{% endgeneration %}",
    ],
    ids=["chatml", "refuses a role", "extensions"],
)
def test_a_template_that_renders_alike_passes(template: str) -> None:
    check(template, template)


@pytest.mark.parametrize(
    ("shipped", "source"),
    [
        (CHATML.replace("\n", ""), CHATML),
        ("{{ messages[0].content | escape }}", "{{ messages[0].content }}"),
        ("{{ pad_token }}{{ messages[0].content }}", "{{ pad_token }}{{ messages[0].content }}"),
        ("{{ messages[0].content }}", "{{ raise_exception('no') }}"),
        ("{{ raise_exception('no') }}", "{{ messages[0].content }}"),
    ],
    ids=["new lines", "escaped", "another variable", "refused by transformers", "refused by a device"],
)
def test_a_template_that_renders_otherwise_is_refused(shipped: str, source: str) -> None:
    with pytest.raises(QualityError, match=r"the chat template renders .* on a device; transformers renders .*; use"):
        check(shipped, source)
