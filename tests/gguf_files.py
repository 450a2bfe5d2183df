"""Tiny GGUF files, most with a vocabulary and no tensors, and slow twins of the rules by which they encode."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import regex
from gguf import GGUFWriter
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers.pre_tokenizers import ByteLevel

from common.gguf_metadata import GgufVocabulary, TokenType

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TINY_HIDDEN = 32
BYTES = sorted(ByteLevel.alphabet())


def write_gguf(path: Path, tokens: Sequence[str], types: Sequence[int], **settings: Any) -> Path:
    """Write a file with a vocabulary; ``settings`` are the names of GGUFWriter's methods without ``add_``."""
    writer = GGUFWriter(path, settings.pop("architecture", "llama"))
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def tiny_model_file(path: Path, **settings: Any) -> Path:
    """A Llama model of two layers with random weights and the vocabulary of ``byte_level_file``; see ``write_gguf``."""
    hidden, inner, layers, heads, kv_heads = TINY_HIDDEN, 48, 2, 4, 2
    vocabulary = GgufVocabulary.read(byte_level_file(path))
    rng, writer = np.random.default_rng(0), GGUFWriter(path, "llama")
    for name, value in (
        ("context_length", 256), ("embedding_length", hidden), ("feed_forward_length", inner), ("block_count", layers),
        ("head_count", heads), ("head_count_kv", kv_heads), ("layer_norm_rms_eps", 1e-5), ("rope_freq_base", 10_000.0),
        ("vocab_size", len(vocabulary.tokens)), ("tokenizer_model", "gpt2"), ("tokenizer_pre", "qwen2"),
        ("token_list", vocabulary.tokens), ("token_types", vocabulary.types), ("token_merges", vocabulary.merges),
        ("bos_token_id", vocabulary.special_ids["bos"]), ("eos_token_id", vocabulary.special_ids["eos"]),
        ("chat_template", CHATML), *settings.items(),
    ):  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    narrow = hidden * kv_heads // heads
    block = {
        "attn_q": (hidden, hidden), "attn_k": (narrow, hidden), "attn_v": (narrow, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
        "attn_norm": (hidden,), "ffn_norm": (hidden,),
    }  # fmt: skip
    shapes = {"token_embd": (len(vocabulary.tokens), hidden), "output_norm": (hidden,)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_file(path: Path, **changes: Any) -> Path:
    """Bytes, two merges, two control tokens, two user-defined ones, and padding."""
    normal = [*BYTES, "Ġh", "Ġhi"]
    others = {
        "<|im_start|>": TokenType.CONTROL,
        "<|im_end|>": TokenType.CONTROL,
        "<tool_call>": TokenType.USER_DEFINED,
        "two words": TokenType.USER_DEFINED,
        "[PAD262]": TokenType.UNUSED,
    }
    settings = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "qwen2",
        "token_merges": ["Ġ h", "Ġh i"],
        "bos_token_id": len(normal),
        "eos_token_id": len(normal) + 1,
        "chat_template": CHATML,
        **changes,
    }
    types = [TokenType.NORMAL] * len(normal) + list(others.values())
    return write_gguf(path, [*normal, *others], types, **{k: v for k, v in settings.items() if v is not None})


def sentencepiece_file(path: Path, proto: ModelProto, **changes: Any) -> Path:
    """The vocabulary of a SentencePiece model, with spaces in user-defined tokens as converters write them."""
    tokens = [
        piece.piece.replace("▁", " ") if piece.type == TokenType.USER_DEFINED else piece.piece for piece in proto.pieces
    ]
    settings = {
        "tokenizer_model": "llama",
        "token_scores": [piece.score for piece in proto.pieces],
        "unk_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
        **changes,
    }
    return write_gguf(path, tokens, [piece.type for piece in proto.pieces], **settings)


def sentencepiece_referee(vocabulary: GgufVocabulary) -> SentencePieceProcessor:
    """The sentencepiece package on a model that is rebuilt from a file's pieces, types and scores."""
    proto = ModelProto()
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.byte_fallback = TokenType.BYTE in vocabulary.types
    proto.normalizer_spec.add_dummy_prefix = vocabulary.add_space_prefix is not False
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    rows = zip(vocabulary.tokens, vocabulary.types, vocabulary.scores, strict=True)
    for token_id, (token, kind, score) in enumerate(rows):
        is_unknown = token_id == vocabulary.special_ids.get("unk")
        proto.pieces.add(
            piece=token.replace(" ", "▁") if kind == TokenType.USER_DEFINED else token,
            type=TokenType.UNKNOWN if is_unknown else kind,
            score=score,
        )
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def slow_byte_level_ids(vocabulary: GgufVocabulary, split: str, text: str) -> list[int]:
    """Byte-level BPE step by step: of the pairs that have a merge, join the one whose merge comes first."""
    ids = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(vocabulary.merges)}
    characters = _characters_of_bytes()
    found: list[int] = []
    for word in regex.findall(split, text):
        parts = [characters[byte] for byte in word.encode()]
        while True:
            pairs = [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]
            if not pairs:
                break
            at = min(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found += [ids[part] for part in parts]
    return found


def _characters_of_bytes() -> Mapping[int, str]:
    """Printable bytes stand for themselves, the others for the characters from U+0100, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}
