"""Tiny source models with byte tokenizers, as folders of the user's."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from export.convert import ConvertSettings
from export.converters import Converter
from export.quantize import Precision
from tests.gguf_files import CHATML

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
SPECIAL_TOKENS = ["<s>", "</s>"]
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
FP32_GENAI = ConvertSettings(Converter.GENAI, Precision.FP32)


def save_tokenizer(
    folder: Path, special_tokens: list[str] = SPECIAL_TOKENS, *, eos: str | None = None, more: Sequence[str] = ()
) -> int:
    """Save a byte tokenizer, with ``more`` tokens behind the bytes, and return its number of ids."""
    tokens = [*special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet()), *more]
    bytes_only = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token=special_tokens[0],
        eos_token=eos or special_tokens[1],
        additional_special_tokens=special_tokens[2:],
    )
    tokenizer.chat_template = CHATML if "<|im_end|>" in special_tokens else CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokens)


def save_model(folder: Path, eos_token_id: int | list[int] = 1) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SMALL,
        vocab_size=320,  # more logits than token ids, as padded vocabularies have
        intermediate_size=128,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
