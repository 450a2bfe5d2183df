"""Which target models are served: those whose packed batches give the tokens that the model alone gives."""

from typing import Any

from basestation.target.quantized_weights import refuse_unsupported_quantization
from protocol.errors import ModelError

SUPPORTED = (
    "gemma",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
)
"""Architectures whose packed batches the tests compare with their own forward passes."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Position embeddings that depend on a token's own position alone."""
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")


def refuse_unsupported(config: Any) -> None:
    """Refuse an architecture that packed batches are not tested with.

    Raises:
        ModelError: with the architecture and the supported ones; or the weights are quantised in a way that is not
            served.
    """
    architecture = config.get_text_config().model_type
    if architecture not in SUPPORTED or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"architecture {architecture!r} is not supported; supported: {', '.join(SUPPORTED)}")
    if getattr(config.get_text_config(), "use_bidirectional_attention", False):
        raise ModelError("a model with use_bidirectional_attention is not supported: name a causal language model")
    _refuse_rope(config.get_text_config())
    refuse_unsupported_quantization(config)


def _refuse_rope(config: Any) -> None:
    """Refuse position embeddings other than ``ROPE_TYPES``.

    transformers computes some from the longest sequence of a forward pass, so that one
    long session would change the tokens of all others in its batch.

    Raises:
        ModelError: with the type and the supported ones.
    """
    # transformers 4.57 has rope_scaling; 5.x has rope_parameters, for some architectures per type of layer
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for one in [entry for entry in settings.values() if isinstance(entry, dict)] or [settings]:
        kind = one.get("rope_type") or one.get("type") or "default"
        if kind not in ROPE_TYPES:
            reason = ": its factors depend on the longest sequence of a batch" if kind in _BATCH_DEPENDENT_ROPE else ""
            raise ModelError(f"rope type {kind!r} is not supported{reason}; supported: {', '.join(ROPE_TYPES)}")
