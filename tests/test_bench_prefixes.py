"""Shared prefixes, measured on a target with random weights."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from basestation.kv_cache.kv_pool import PAGE_SIZE
from basestation.target.attention import ATTENTION_NAME
from basestation.target.pretrained import register_attention
from basestation.target.target_model import TargetModel
from basestation.target.vocabulary import Vocabulary
from bench.station.prefixes import measure_prefixes
from protocol.errors import SettingsError
from tests.fakes import token_names


@pytest.fixture
def target() -> TargetModel:
    register_attention()
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=torch.float32).eval()
    return TargetModel(model, Vocabulary(token_names(97), 97, frozenset()), "tiny", 2**24)


def test_a_shared_prefix_is_stored_once(target: TargetModel) -> None:
    rows = measure_prefixes(target, 4, PAGE_SIZE + 50, PAGE_SIZE, 5, lambda: None)
    assert [(row["case"], row["kv_positions"]) for row in rows] == [
        ("pass, no prefix shared", 8 * PAGE_SIZE),
        ("pass, 128 tokens shared", 5 * PAGE_SIZE),
        ("prefill, no prefix shared", None),
        ("prefill, 128 tokens shared", None),
    ]
    assert target.kv_pool.used == 0


@pytest.mark.parametrize("shared", [0, -PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE])
def test_a_prefix_that_cannot_be_shared_is_refused(target: TargetModel, shared: int) -> None:
    with pytest.raises(SettingsError, match=rf"shared is {shared}; allowed: a multiple of 128 below"):
        measure_prefixes(target, 2, 2 * PAGE_SIZE, shared, 5, lambda: None)
