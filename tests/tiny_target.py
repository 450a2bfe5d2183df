"""Tiny targets with random weights, of every supported architecture."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from basestation.target.attention import ATTENTION_NAME
from basestation.target.pretrained import register_attention
from basestation.target.target_model import TargetModel
from basestation.target.vocabulary import Vocabulary
from tests.fakes import token_names

ON_CUDA = torch.get_default_device().type == "cuda"
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
VOCAB = 97
CPU = torch.device("cpu")
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
WINDOW = 8
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "starcoder2": {"sliding_window": WINDOW},
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": {"sliding_window": WINDOW, "use_sliding_window": True},
    "smollm3": {
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "no_rope_layer_interval": 2,
    },
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
NO_WINDOWS = {
    architecture: {**changes, "sliding_window": TINY["max_position_embeddings"]}
    for architecture, changes in WINDOWS.items()
}


def tiny_config(architecture: str, **changes: Any) -> Any:
    return AutoConfig.for_model(architecture, **{**TINY, **EXPERTS.get(architecture, {}), **changes})


def tiny_pair(architecture: str, **changes: Any) -> tuple[Any, TargetModel]:
    """A model with random weights as transformers runs it, and the same model as a target."""
    register_attention()
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), attn_implementation="eager").eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = tiny_config(architecture, **changes)
    packed = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).eval()
    packed.load_state_dict(plain.state_dict())
    return plain, TargetModel(packed, Vocabulary(token_names(VOCAB), VOCAB, frozenset()), architecture, 2**24)


ROPE_SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
    },
}


def with_rope(architecture: str, kind: str) -> dict[str, Any]:
    """The changes to a tiny configuration for a rope type, at the name that the installed transformers has."""
    settings = ROPE_SETTINGS[kind]
    if not hasattr(tiny_config(architecture), "rope_parameters"):
        if kind == "default":
            return {}
        if architecture == "olmo2":
            settings = {"type": kind, "factor": 4.0}
        if architecture == "phi3":
            settings = {"type": kind, **{name: settings[name] for name in ("short_factor", "long_factor")}}
        return {"rope_scaling": settings}
    theta = {"rope_theta": 10_000.0, **({"partial_rotary_factor": 0.5} if architecture == "phi" else {})}
    if architecture == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 10_000.0}
        return {"rope_parameters": {"full_attention": {**theta, **settings}, "sliding_attention": local}}
    return {"rope_parameters": {**theta, **settings}}


def ids(length: int, seed: int) -> list[int]:
    token_ids: list[int] = torch.randint(
        3, VOCAB, (length,), generator=torch.Generator(torch.get_default_device()).manual_seed(seed)
    ).tolist()
    return token_ids
