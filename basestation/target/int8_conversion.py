"""Chooses int8 weights for a target, gives it them, and says how far it then agrees with the original."""

import logging
import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from basestation.kv_cache.heap import return_free_memory
from basestation.kv_cache.memory import check_fits
from basestation.target.agreement import Agreement, RunsSegments, answer_prompts, measure_agreement
from basestation.target.int8_cache import agreement_entry, read_agreement, write_agreement
from basestation.target.int8_linear import Int8Linear, RowQuantizer, may_be_int8
from basestation.target.packed_linear import PackedLinear, packed_dtype, replace_linears
from basestation.target.placement import choose_dtype
from basestation.target.quantized_weights import quantization_method
from basestation.target.weight_pages import release_weight_pages

logger = logging.getLogger(__name__)

_TIMED_ROWS = (1, 9)
_TIMED_RUNS = 7


def give_int8_weights(
    model: Any, runner: Callable[[bool], RunsSegments], prompts: Sequence[list[int]], use_cache: bool
) -> Agreement:
    """Replace the linear layers of a model on a CPU.

    Args:
        model: a transformers model.
        runner: runs its passes; told whether rows must be independent of each other.
        prompts: token ids; the original's greedy answers to them are compared.
        use_cache: whether the agreement is read from, and written to, the user's cache.

    Returns:
        How far the model agrees with the original.
    """
    entry = agreement_entry(model, prompts) if use_cache else None
    if known := read_agreement(entry):
        convert(model)
        return known
    texts = answer_prompts(runner(False), prompts)
    convert(model)
    agreement = measure_agreement(runner(True), texts)
    write_agreement(entry, agreement)
    return agreement


def convert(model: Any, rotate: Callable[[str], bool] | None = None) -> None:
    """Replace a CPU model's linear layers by int8 ones.

    Args:
        model: a transformers model.
        rotate: whether a layer's rows are rotated, by its name; None to rotate where outliers are largest.
    """
    quantizer, head = RowQuantizer(), model.get_output_embeddings()

    def replacement(name: str, layer: nn.Linear) -> Int8Linear:
        rotated = rotate(name) if rotate else _has_outliers(model, layer)
        return Int8Linear(layer, rotated, quantizer, torch.float32 if layer is head else None)

    replace_linears(model, replacement)
    model.to(packed_dtype(model.dtype))
    release_weight_pages(model)
    return_free_memory()


def _has_outliers(model: Any, layer: nn.Linear) -> bool:
    """Whether a layer's rows have the largest outliers: the head's, and those that are not of the hidden state's width.

    These are a down projection's; see ``edgedraft-bench weights``.
    """
    return layer is model.get_output_embeddings() or layer.in_features != model.get_input_embeddings().embedding_dim


def uses_int8(config: Any, weights: str, dtype: str, placement: torch.device, ranks: int = 1) -> bool:
    """Whether linear layers get int8 weights: with ``auto``, whether they can and are faster.

    Args:
        config: of the model.
        weights: of ``WEIGHTS``.
        dtype: the option; see ``choose_dtype``.
        placement: where the target runs.
        ranks: over which it is split.

    Raises:
        SettingsError: there is no such kind of weights, or int8 cannot be used.
        ModelError: the model does not fit.
    """
    if not may_be_int8(weights, placement, quantization_method(config), ranks):
        return False
    if weights == "int8":
        return True
    int8_dtype = choose_dtype(dtype, placement, int8=True)
    check_fits(config, int8_dtype, placement, int8=True)  # before a layer of each shape is made
    return is_faster(config, choose_dtype(dtype, placement), int8_dtype)


@torch.inference_mode()
def is_faster(config: Any, dtype: torch.dtype, int8_dtype: torch.dtype) -> bool:
    """Whether int8 weights are faster than packed ones: a layer of each shape, with few rows, in turns.

    Args:
        config: of the model.
        dtype: of its weights, unless they are int8.
        int8_dtype: of its other weights, if they are.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {layer.weight.shape: layer for layer in model.modules() if type(layer) is nn.Linear}
    seconds = {"dtype": 0.0, "int8": 0.0}
    for layer in shapes.values():
        zeros = _zeros_like(layer, dtype)
        packed = PackedLinear(zeros, packed_dtype(dtype))
        int8 = Int8Linear(zeros, _has_outliers(model, layer), RowQuantizer())
        for count in _TIMED_ROWS:
            best = dict.fromkeys(seconds, math.inf)
            for _ in range(_TIMED_RUNS):
                for name, one, held in (("dtype", packed, dtype), ("int8", int8, int8_dtype)):
                    rows = torch.randn(count, layer.in_features, dtype=packed_dtype(held))
                    began = perf_counter()
                    one(rows)
                    best[name] = min(best[name], perf_counter() - began)
            seconds = {name: seconds[name] + best[name] for name in seconds}
    ratio = seconds["int8"] / seconds["dtype"]
    faster = ratio < 1
    logger.info(
        "weights auto: int8 takes %.2f of the time of packed weights; using %s", ratio, "int8" if faster else "dtype"
    )
    return faster


def _zeros_like(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """A layer of that shape on the CPU: how long it takes does not depend on its weights."""
    shape = layer.in_features, layer.out_features
    zeros = nn.Linear(*shape, bias=False, device="meta", dtype=dtype).to_empty(device="cpu")
    nn.init.zeros_(zeros.weight)
    return zeros
