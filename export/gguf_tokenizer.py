"""A fast tokenizer from the vocabulary of a GGUF file, by the rules that the file names.

``tokenizer.ggml.model`` is ``gpt2`` (byte-level BPE with merges) or ``llama``
(SentencePiece BPE, whose merges follow from the scores). Control and user-defined
tokens encode as themselves. What is not known here is refused by name.
``add_eos_token`` does not count: the text of a prompt goes on.
"""

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from common.gguf_metadata import GgufVocabulary, TokenType
from protocol.errors import ModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "phi-2": (_GPT2,),
    "olmo": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
}
"""The regular expressions by which text is split before merges, by ``tokenizer.ggml.pre``."""
_WITH_BOS = ("llama-bpe",)
"""Values of ``tokenizer.ggml.pre`` that add the first token where the file does not say."""
_STRIPPING = "phi3"
"""The architecture whose control tokens take the white space behind them; files do not say so."""
_NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")
_SPACE = "▁"
_NAMED_ROLES = ("bos", "eos", "pad", "unk")


def gguf_tokenizer(vocabulary: GgufVocabulary) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file.

    Raises:
        ModelError: the file names a kind of tokenizer that is not supported, or its vocabulary contradicts itself.
    """
    if vocabulary.model == "gpt2":
        parts = _byte_level(vocabulary)
    elif vocabulary.model == "llama":
        parts = _sentencepiece_bpe(vocabulary)
    else:
        raise ModelError(f"tokenizer.ggml.model is {vocabulary.model!r}; supported: gpt2, llama")
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(vocabulary)),
        **parts,
    }
    names = {
        f"{role}_token": vocabulary.tokens[token_id]
        for role, token_id in vocabulary.special_ids.items()
        if role in _NAMED_ROLES
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_from_json(content), clean_up_tokenization_spaces=False, **names
    )
    tokenizer.chat_template = vocabulary.chat_template
    return tokenizer


def _from_json(content: dict[str, Any]) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises Exception itself
        raise ModelError(f"the file's vocabulary contradicts itself: {error}; convert the file again") from error


def _added_tokens(vocabulary: GgufVocabulary) -> Iterator[dict[str, Any]]:
    stripping = (vocabulary.architecture, vocabulary.model) == (_STRIPPING, "llama")
    for token_id in vocabulary.of_type(TokenType.CONTROL, TokenType.USER_DEFINED):
        content = vocabulary.tokens[token_id]
        is_control = vocabulary.types[token_id] == TokenType.CONTROL
        yield {
            "id": token_id,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": stripping and is_control and content not in _NOT_STRIPPING,
            "normalized": False,
            "special": is_control,
        }


def _byte_level(vocabulary: GgufVocabulary) -> dict[str, Any]:
    if vocabulary.pre not in _SPLITS:
        raise ModelError(f"tokenizer.ggml.pre is {vocabulary.pre!r}; supported: {', '.join(_SPLITS)}")
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in _SPLITS[vocabulary.pre]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "normalizer": {"type": "NFC"} if vocabulary.pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": _post_processor(vocabulary, default=vocabulary.pre in _WITH_BOS),
        "decoder": byte_level,
        "model": {
            **_BPE,
            "vocab": _ids(vocabulary),
            "merges": list(vocabulary.merges),
            "ignore_merges": vocabulary.pre == "llama-bpe",
        },
    }


def _sentencepiece_bpe(vocabulary: GgufVocabulary) -> dict[str, Any]:
    if not vocabulary.scores:
        raise ModelError("the file has a SentencePiece vocabulary without tokenizer.ggml.scores; convert it again")
    prefix = vocabulary.add_space_prefix is not False
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = vocabulary.special_ids.get("unk")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "post_processor": _post_processor(vocabulary, default=True),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            **_BPE,
            "vocab": _ids(vocabulary),
            "merges": _merges_by_score(vocabulary),
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": None if unknown is None else vocabulary.tokens[unknown],
        },
    }


_BPE: dict[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def _ids(vocabulary: GgufVocabulary) -> dict[str, int]:
    return {token: token_id for token_id, token in enumerate(vocabulary.tokens)}


def _merges_by_score(vocabulary: GgufVocabulary) -> list[list[str]]:
    """Every way to make a normal piece of two others, the piece with the highest score first."""
    ids = _ids(vocabulary)
    normal = vocabulary.of_type(TokenType.NORMAL)
    allowed = {vocabulary.tokens[token_id] for token_id in normal}
    merges = []
    for token_id in normal:
        token, score = vocabulary.tokens[token_id], vocabulary.scores[token_id]
        for end in range(1, len(token)):
            left, right = token[:end], token[end:]
            if left in allowed and right in allowed:
                merges.append((-score, ids[left], ids[right], left, right))
    merges.sort()
    return [[left, right] for *_, left, right in merges]


def _post_processor(vocabulary: GgufVocabulary, default: bool) -> dict[str, Any] | None:
    add_bos = default if vocabulary.add_bos is None else vocabulary.add_bos
    if not add_bos or "bos" not in vocabulary.special_ids:
        return None
    token_id = vocabulary.special_ids["bos"]
    token = vocabulary.tokens[token_id]
    first, second = ({"Sequence": {"id": part, "type_id": index}} for index, part in enumerate("AB"))
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
