"""Quantised checkpoints: which are served, whether their kernels are installed, and how much memory they take.

transformers loads them. Knows configurations and files; not tensors.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import AutoHfQuantizer

from common.error_text import first_line
from protocol.errors import ModelError

KERNELS = {
    "awq": "autoawq",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "fbgemm-gpu-genai",
    "fp8": "triton",
    "gptq": "gptqmodel",
    "torchao": "torchao",
}
"""The methods that are served, and the package with the kernels of each."""
_FILES = ("model.safetensors", "pytorch_model.bin")
_ON_CUDA_ALONE = ("fbgemm_fp8", "fp8")
_REMEDY = "name the model's float16 or bfloat16 weights, or a .gguf file, which is dequantised"
_FAILURES = (
    AssertionError,
    AttributeError,
    ImportError,
    KeyError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What packages of quantisation methods raise for a configuration or an environment that they do not support."""


def quantization_method(config: Any) -> str | None:
    """The method by which a model's weights are quantised, None for none."""
    settings = _settings(config)
    if settings is None:
        return None
    if _bits(settings):  # older checkpoints do not name it
        return "bitsandbytes"
    method = settings.get("quant_method")
    return str(getattr(method, "value", method))


def refuse_unsupported_quantization(config: Any) -> None:
    """Refuse weights whose method is not served, or with which the other tokens of a pass change a token's result.

    Raises:
        ModelError: with the method and the reason.
    """
    settings, method = _settings(config), quantization_method(config)
    if settings is None:
        return
    if method not in KERNELS:
        raise ModelError(
            f"weights quantised by {method!r} are not supported; supported: {', '.join(KERNELS)}; or {_REMEDY}"
        )
    if reason := _refused_setting(str(method), settings):
        raise ModelError(f"weights quantised by {method!r} with {reason}; {_REMEDY}")


def quantized_bytes(config: Any, folder: Path, expanded: int, placement: torch.device) -> int:
    """The bytes that quantised weights take after loading.

    Args:
        config: of the model.
        folder: with its files.
        expanded: bytes of the weights if they are dequantised.
        placement: where they go.

    Raises:
        ModelError: the method's kernels are not installed or do not run there.
    """
    method = quantization_method(config)
    if placement.type != "cuda" and method in _ON_CUDA_ALONE:
        raise ModelError(f"weights quantised by {method!r} run on CUDA alone, not on {placement}; {_REMEDY}")
    try:
        quantizer = AutoHfQuantizer.from_config(_settings(config), pre_quantized=True)
        quantizer.validate_environment(device_map={"": str(placement)}, weights_only=True)
    except _FAILURES as error:
        reason = first_line(error)
        remedy = f"install {KERNELS[str(method)]}, or {_REMEDY}"
        raise ModelError(
            f"weights quantised by {method!r} cannot be loaded on {placement}: {reason}; {remedy}"
        ) from error
    if method == "compressed-tensors" or getattr(quantizer.quantization_config, "dequantize", False):
        return expanded
    return _stored_bytes(folder)


def without_later_expansion(config: Any) -> Any:
    """A model's configuration with which transformers expands compressed tensors when it loads them.

    It would expand them in the first pass, when the KV pool has taken the memory.
    """
    if quantization_method(config) == "compressed-tensors":
        config.quantization_config = {**(_settings(config) or {}), "run_compressed": False}
    return config


def _settings(config: Any) -> dict[str, Any] | None:
    """``quantization_config`` of a ``config.json``, None without one."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    return dict(settings if isinstance(settings, dict) else settings.to_dict())


def _refused_setting(method: str, settings: dict[str, Any]) -> str | None:
    """What the settings of a method ask for that packed passes cannot serve."""
    if _bits(settings) == 8 and settings.get("llm_int8_threshold", 6.0) > 0:
        return "outliers are not supported: which columns are outliers depends on all tokens of a pass"
    if method == "awq" and settings.get("do_fuse"):
        return "fused modules are not supported: they have an attention of their own"
    if settings.get("kv_cache_scheme"):
        return "a kv_cache_scheme are not supported: the KV pool is not quantised"
    if _scales_whole_passes(method, settings):
        return "one scale for all activations are not supported: it depends on all tokens of a pass"
    return None


def _bits(settings: dict[str, Any]) -> int | None:
    """Bits of weights that bitsandbytes has quantised, None for other methods."""
    return next((bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), None)


def _scales_whole_passes(method: str, settings: dict[str, Any]) -> bool:
    """Whether activations are quantised with one scale that is computed from all tokens of a pass."""
    if method == "compressed-tensors":
        inputs = [group.get("input_activations") or {} for group in settings.get("config_groups", {}).values()]
        return any(one.get("dynamic") and one.get("strategy") == "tensor" for one in inputs)
    if method != "torchao":
        return False
    kind = json.dumps(settings.get("quant_type"))
    if "DynamicActivation" not in kind:
        return "autoquant" in kind
    return "PerTensor" in kind or ("Float8Dynamic" in kind and "PerRow" not in kind)


def _stored_bytes(folder: Path) -> int:
    """The size of the files with the weights."""
    for name in _FILES:
        whole, index = folder / name, folder / f"{name}.index.json"
        if index.is_file():
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return sum((folder / part).stat().st_size for part in set(parts.values()))
        if whole.is_file():
            return whole.stat().st_size
    raise ModelError(f"{str(folder)!r} contains neither {' nor '.join(_FILES)}; download it again")
