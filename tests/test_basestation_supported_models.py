"""Architectures and settings of positions that are not supported are refused before loading."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import AutoConfig

from basestation.target.supported_models import refuse_unsupported
from basestation.target.target_model import TargetModel
from common.gguf_rope import refuse_gguf_rope
from protocol.errors import ModelError
from tests.tiny_target import tiny_config, with_rope


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "mamba", "t5"])
def test_an_unsupported_architecture_is_refused_with_the_supported_ones(architecture: str) -> None:
    with pytest.raises(ModelError, match=f"architecture '{architecture}' is not supported; supported: .*llama.*qwen3"):
        refuse_unsupported(AutoConfig.for_model(architecture))


@pytest.mark.parametrize(
    ("architecture", "kind"), [*(("llama", kind) for kind in ("dynamic", "longrope")), ("phi3", "longrope")]
)
def test_a_batch_dependent_rope_type_is_refused_by_name(architecture: str, kind: str) -> None:
    config = tiny_config(architecture, **with_rope(architecture, kind), original_max_position_embeddings=64)
    with pytest.raises(ModelError, match=f"rope type '{kind}' is not supported: .*; supported: default, linear"):
        refuse_unsupported(config)


def config_like(**fields: Any) -> Any:
    """A configuration as another version of transformers may lay it out."""
    config = SimpleNamespace(model_type="llama", **fields)
    config.get_text_config = lambda: config
    return config


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "proportional"])
def test_every_layout_of_rope_settings_is_read(name: str, nested: bool, key: str, kind: str) -> None:
    settings: dict[str, Any] = {key: kind, "factor": 2.0}
    if nested:
        settings = {"sliding_attention": {"rope_type": "default"}, "full_attention": settings}
    with pytest.raises(ModelError, match=f"rope type '{kind}' is not supported"):
        refuse_unsupported(config_like(**{name: settings}))


@pytest.mark.parametrize("settings", [{}, None, {"rope_type": "yarn", "factor": 2.0}, {"type": "linear"}])
def test_other_rope_settings_are_served(settings: dict[str, Any] | None) -> None:
    refuse_unsupported(config_like(rope_scaling=settings))
    refuse_unsupported(config_like(rope_parameters=settings))


def test_a_bidirectional_model_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="use_bidirectional_attention is not supported"):
        refuse_unsupported(tiny_config("gemma3_text", use_bidirectional_attention=True))


@pytest.mark.parametrize(
    ("scaling", "tensor", "match"),
    [
        ("yarn", "", "llama.rope.scaling.type 'yarn', which is not read from GGUF; name the model's folder"),
        ("", "rope_freqs.weight", "the tensor 'rope_freqs.weight', which is not read; name the model's folder"),
        ("", "rope_factors_long.weight", "the tensor 'rope_factors_long.weight'"),
        ("none", "token_embd.weight", ""),
    ],
)
def test_a_gguf_file_with_scaled_positions_is_refused(scaling: str, tensor: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if scaling:
        writer.add_string("llama.rope.scaling.type", scaling)
    if tensor:
        writer.add_tensor(tensor, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not match:
        refuse_gguf_rope(path)
        return
    with pytest.raises(ModelError, match=match):
        TargetModel.load(str(path))
