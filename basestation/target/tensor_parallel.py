"""Splits a target's weights over several processes (ranks): attention by heads, MLPs by their inner columns.

Each rank computes with its heads and columns; after attention and after each MLP the ranks add up what they have.
transformers' plan of an architecture says which linear layers are split in which way. Embeddings and norms are whole
on every rank. The output head is whole on rank 0, which alone needs logits.

Knows models and the sum over ranks; not how ranks are started or what they run.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from basestation.target.quantized_weights import quantization_method
from protocol.errors import ModelError, SettingsError

SPLITTABLE = (
    "gemma",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "phi",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
)
"""Architectures whose answers on two ranks the tests compare with those on one."""


@dataclass(frozen=True)
class Share:
    """A rank's part of a target.

    Attributes:
        rank: from 0.
        ranks: how many there are.
    """

    rank: int = 0
    ranks: int = 1

    def of(self, tensor: Tensor, dimension: int) -> Tensor:
        """A copy of this rank's part of a tensor along a dimension."""
        return tensor.tensor_split(self.ranks, dimension)[self.rank].clone(memory_format=torch.contiguous_format)


class SummedLinear(nn.Module):
    """A linear layer of which each rank has some input columns: the ranks' products are added up."""

    def __init__(self, part: nn.Linear) -> None:
        super().__init__()
        self.part = part

    def forward(self, rows: Tensor) -> Tensor:
        """Apply the layer: this rank's columns of […, in_features] to […, out_features]; all ranks at once."""
        product: Tensor = self.part(rows)
        distributed.all_reduce(product)
        return product


def refuse_unsplittable(config: Any, ranks: int) -> None:
    """Refuse a target that cannot be split over ``ranks``.

    Raises:
        ModelError: its architecture or its quantised weights are not split.
        SettingsError: its heads do not divide.
    """
    if ranks == 1:
        return
    text = config.get_text_config()
    if text.model_type not in SPLITTABLE:
        allowed = f"--tensor-parallel is for {', '.join(SPLITTABLE)}"
        raise ModelError(f"architecture {text.model_type!r} is not split over ranks; {allowed}")
    if (method := quantization_method(config)) is not None:
        raise ModelError(f"weights quantised by {method!r} are not split over ranks; leave out --tensor-parallel")
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % ranks or kv_heads % ranks:
        divisors = [str(one) for one in range(1, kv_heads + 1) if heads % one == kv_heads % one == 0]
        allowed = f"{', '.join(divisors)}, which divide {heads} attention heads and {kv_heads} key-value heads"
        raise SettingsError("tensor-parallel", ranks, allowed)


def split(model: Any, share: Share) -> None:
    """Keep a rank's share of a loaded model's weights; the model may be on PyTorch's meta device.

    ``refuse_unsplittable`` must have accepted its configuration.
    """
    decoder = model.get_decoder()
    for pattern, style in model.config.get_text_config().base_model_tp_plan.items():
        if style in _PARTS:
            layers = list(_matching(decoder, pattern))
            assert layers, pattern
            for parent, name in layers:
                setattr(parent, name, _PARTS[style](getattr(parent, name), share))
    if share.rank:
        model.set_output_embeddings(nn.Identity())


def _matching(decoder: nn.Module, pattern: str) -> Iterator[tuple[nn.Module, str]]:
    """The parent and the name of each module that a pattern of a plan matches."""
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    for full_name in [name for name, _ in decoder.named_modules() if expression.fullmatch(name)]:
        parent, _, name = full_name.rpartition(".")
        yield decoder.get_submodule(parent), name


def _output_rows(layer: nn.Linear, share: Share) -> nn.Module:
    bias = None if layer.bias is None else share.of(layer.bias.detach(), 0)
    return _linear(share.of(layer.weight.detach(), 0), bias)


def _input_columns(layer: nn.Linear, share: Share) -> nn.Module:
    """The bias is rank 0's, so that the sum has it once."""
    bias = None if layer.bias is None or share.rank else layer.bias.detach()
    return SummedLinear(_linear(share.of(layer.weight.detach(), 1), bias))


_PARTS: dict[str, Callable[[nn.Linear, Share], nn.Module]] = {"colwise": _output_rows, "rowwise": _input_columns}
"""By the name of a style in transformers' plans, whose columns are those of the transposed weight."""


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
