"""Gives a loaded target int8 weights, and says how far it then agrees with the original."""

import logging
import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import nn

from basestation.kv_cache.heap import return_free_memory
from basestation.target.agreement import Agreement, RunsSegments, answer_prompts, measure_agreement
from basestation.target.int8_cache import agreement_entry, read_agreement, write_agreement
from basestation.target.int8_linear import Int8Linear, RowQuantizer
from basestation.target.packed_linear import PackedLinear, packed_dtype, replace_linears
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


@torch.inference_mode()
def is_faster(model: Any) -> bool:
    """Whether int8 weights are faster than packed ones: a layer of each shape, with few rows, in turns."""
    shapes = {layer.weight.shape: layer for layer in model.modules() if type(layer) is nn.Linear}
    seconds = {"dtype": 0.0, "int8": 0.0}
    for layer in shapes.values():
        dtype = packed_dtype(layer.weight.dtype)
        packed, int8 = PackedLinear(layer, dtype), Int8Linear(layer, _has_outliers(model, layer), RowQuantizer())
        for count in _TIMED_ROWS:
            best = dict.fromkeys(seconds, math.inf)
            for _ in range(_TIMED_RUNS):
                rows = torch.randn(count, layer.in_features, dtype=dtype)
                for name, one in (("dtype", packed), ("int8", int8)):
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
