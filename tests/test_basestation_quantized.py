"""Quantised checkpoints: one is served and sized rightly; others are refused by name, each with its reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from basestation.kv_cache.memory import check_fits
from basestation.target.pretrained import read_config
from basestation.target.quantized_weights import KERNELS, quantization_method, without_later_expansion
from basestation.target.segment import Segment
from basestation.target.supported_models import refuse_unsupported
from basestation.target.target_model import TargetModel
from protocol.errors import ModelError
from tests.tiny_source import save_tokenizer
from tests.tiny_target import ids, tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LARGER = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 320}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose linear layers have 4 bits."""
    whole, quantized = (tmp_path_factory.mktemp(name) for name in ("whole", "quantized"))
    with CPU:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config("llama", **LARGER)).save_pretrained(whole)
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        load = AutoModelForCausalLM.from_pretrained
        load(whole, quantization_config=settings, device_map={"": "cpu"}).save_pretrained(quantized)
    save_tokenizer(quantized)
    return quantized


def test_a_quantised_target_gives_the_logits_that_transformers_gives(checkpoint: Path) -> None:
    placement = torch.get_default_device().type
    load = AutoModelForCausalLM.from_pretrained
    plain = load(checkpoint, dtype="float32", device_map={"": placement}, attn_implementation="eager")
    target = TargetModel.load(str(checkpoint), "float32", placement, "16MiB")
    texts = [ids(40, 1), ids(9, 2)]
    kv_caches = [target.new_kv_cache() for _ in texts]
    target.forward([Segment(kv_cache, text[:-5], 0) for kv_cache, text in zip(kv_caches, texts, strict=True)])
    segments = [Segment(kv_cache, text[-5:], 5) for kv_cache, text in zip(kv_caches, texts, strict=True)]
    for text, rows in zip(texts, torch.split(target.forward(segments), 5), strict=True):
        with torch.inference_mode():
            expected = plain(torch.tensor([text]), use_cache=False).logits[0, -5:, : rows.shape[1]]
        assert torch.allclose(rows, expected, atol=2e-4, rtol=1e-3), float((rows - expected).abs().max())


def test_quantised_weights_are_sized_as_they_are_stored(checkpoint: Path) -> None:
    config = read_config(str(checkpoint))
    needed = check_fits(config, torch.float32, CPU, checkpoint)
    with CPU:
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint, device_map={"": "cpu"})
    assert needed == pytest.approx(loaded.get_memory_footprint(), rel=0.15)
    whole = check_fits(tiny_config("llama", **LARGER), torch.float32, CPU)
    assert needed < 0.5 * whole


def test_weights_in_several_files_are_added_up(checkpoint: Path, tmp_path: Path) -> None:
    config = read_config(str(checkpoint))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1", "b": "2", "c": "1"}}')
    for name, size in (("1", 300), ("2", 50), ("consolidated.safetensors", 1000)):
        (tmp_path / name).write_bytes(bytes(size))
    assert check_fits(config, torch.float32, CPU, tmp_path) == 350
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"contains neither model\.safetensors nor pytorch_model\.bin"):
        check_fits(config, torch.float32, CPU, tmp_path)


def quantized_config(**settings: Any) -> Any:
    return tiny_config("llama", quantization_config=settings)


@pytest.mark.parametrize("method", KERNELS)
def test_methods_that_transformers_loads_are_not_refused_by_their_name(method: str) -> None:
    config = quantized_config(quant_method=method, bits=4)
    refuse_unsupported(config)
    assert quantization_method(config) == method


@pytest.mark.parametrize("method", ["quanto", "mxfp4", "spqr", "of the future"])
def test_other_methods_are_refused_by_name(method: str) -> None:
    with pytest.raises(ModelError, match=f"weights quantised by '{method}' are not supported; supported: awq, bits"):
        refuse_unsupported(quantized_config(quant_method=method))


def activations(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"input_activations": settings}}}


def torchao(**data: Any) -> dict[str, Any]:
    kind = {"_type": "Float8DynamicActivationFloat8WeightConfig", "_version": 2, "_data": data}
    return {"quant_method": "torchao", "quant_type": {"default": kind}}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"load_in_8bit": True, "llm_int8_threshold": 6.0},
            "which columns are outliers depends on all tokens of a pass",
        ),
        ({"quant_method": "awq", "do_fuse": True}, "fused modules are not supported"),
        ({**activations(dynamic=False), "kv_cache_scheme": {"num_bits": 8}}, "a kv_cache_scheme are not supported"),
        (activations(dynamic=True, strategy="tensor"), "one scale for all activations"),
        (torchao(granularity=[{"_type": "PerTensor"}]), "one scale for all activations"),
        (torchao(), "one scale for all activations"),
        ({"quant_method": "torchao", "quant_type": "autoquant"}, "one scale for all activations"),
    ],
    ids=str,
)
def test_what_makes_a_token_depend_on_its_neighbours_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        refuse_unsupported(quantized_config(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_8bit": True, "llm_int8_threshold": 0.0},
        {"load_in_4bit": True},
        activations(dynamic=True, strategy="token"),
        activations(dynamic=False, strategy="tensor"),
        torchao(granularity=[{"_type": "PerRow"}]),
        {"quant_method": "torchao", "quant_type": "int8_weight_only"},
    ],
    ids=str,
)
def test_what_leaves_a_token_to_itself_is_served(settings: dict[str, Any]) -> None:
    refuse_unsupported(quantized_config(**settings))


@pytest.mark.parametrize("method", ["awq", "compressed-tensors", "gptq", "torchao"])
def test_missing_kernels_are_named_in_one_line(method: str, tmp_path: Path) -> None:
    config = quantized_config(quant_method=method, bits=4, group_size=128, quant_type="int8_weight_only")
    with pytest.raises(
        ModelError, match=rf"^weights quantised by '{method}' cannot be loaded on cpu: .+; install {KERNELS[method]}"
    ) as refused:
        check_fits(config, torch.float32, CPU, tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8"])
def test_fp8_on_a_cpu_is_refused(method: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"weights quantised by '{method}' run on CUDA alone, not on cpu"):
        check_fits(quantized_config(quant_method=method), torch.float32, CPU, tmp_path)


def test_compressed_tensors_are_expanded_before_the_kv_pool_takes_the_memory() -> None:
    config = without_later_expansion(quantized_config(**activations(dynamic=True)))
    assert config.quantization_config["run_compressed"] is False
    assert "run_compressed" not in without_later_expansion(quantized_config(load_in_4bit=True)).quantization_config
