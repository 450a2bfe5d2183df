"""The measurement of common beginnings, on a target with random weights."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from basestation.kv_pool import ATTENTION_NAME, STEP
from basestation.target_model import TargetModel, Vocabulary, register_attention
from bench.station.prefixes import measure_prefixes
from protocol.errors import SettingsError


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
    return TargetModel(model, Vocabulary(97, bytes(32), frozenset()), "tiny", 2**24)


def test_what_is_in_common_is_held_once_in_the_measured_passes(target: TargetModel) -> None:
    rows = measure_prefixes(target, 4, STEP + 50, STEP, 5, lambda: None)
    assert [(row["case"], row["kv_positions"]) for row in rows] == [
        ("pass, nothing in common", 8 * STEP),
        ("pass, 128 in common", 5 * STEP),
        ("prefill, all", None),
        ("prefill, behind 128 in common", None),
    ]
    assert target.kv_pool.used == 0


@pytest.mark.parametrize("shared", [0, -STEP, STEP + 1, 2 * STEP])
def test_what_cannot_be_in_common_is_refused(target: TargetModel, shared: int) -> None:
    with pytest.raises(SettingsError, match=rf"shared is {shared}; allowed: a multiple of 128 below"):
        measure_prefixes(target, 2, 2 * STEP, shared, 5, lambda: None)
