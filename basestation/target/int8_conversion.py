"""Gives a loaded target int8 weights, and says how far it then agrees with the original.

Both use the original's own greedy answers to a few prompts: some decide how inputs become integers, the others measure
the agreement.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import nn

from basestation.kv_cache.heap import return_free_memory
from basestation.target.agreement import Agreement, RunsSegments, answer_prompts, measure_agreement
from basestation.target.int8_cache import Int8Figures, figures_entry, read_figures, write_figures
from basestation.target.int8_calibration import LinearInput, Mixture, observe_inputs, rule_for
from basestation.target.int8_linear import InputRule, Int8Linear, RowQuantizer
from basestation.target.packed_linear import PackedLinear, packed_dtype, replace_linears

logger = logging.getLogger(__name__)

MIXTURE = Mixture(smoothing=0.5, wide_from=16.0, most_wide=1 / 32)
CALIBRATION_TEXTS = 4
"""How many of the texts decide about inputs."""
_TIMED_ROWS = (1, 9)
_TIMED_RUNS = 7


def give_int8_weights(
    model: Any, runner: Callable[[bool], RunsSegments], prompts: Sequence[list[int]], use_cache: bool
) -> Agreement:
    """Replace the linear layers of a model on a CPU.

    Args:
        model: a transformers model.
        runner: runs its passes; told whether rows must be independent of each other.
        prompts: token ids.
        use_cache: whether what was measured is read from, and written to, the user's cache.

    Returns:
        How far the model agrees with the original.
    """
    entry = figures_entry(model, prompts) if use_cache else None
    if known := read_figures(entry):
        convert(model, known.rules)
        return known.agreement
    texts = answer_prompts(runner(False), prompts)
    rules = rules_for(model, observe_inputs(model, runner(False), texts.part(slice(CALIBRATION_TEXTS))), MIXTURE)
    wide = sum(rule.wide is not None for rule in rules.values())
    logger.info("int8 weights: %d of %d linear layers have input columns of 16 bits", wide, len(rules))
    convert(model, rules)
    agreement = measure_agreement(runner(True), texts.part(slice(CALIBRATION_TEXTS, None)))
    write_figures(entry, Int8Figures(rules, agreement))
    return agreement


def rules_for(model: nn.Module, inputs: Sequence[LinearInput], mixture: Mixture) -> dict[str, InputRule]:
    """The rules for the inputs of a model's linear layers, by layer."""
    rules = {}
    for found in inputs:
        layers = [layer for layer in map(model.get_submodule, found.layers) if isinstance(layer, nn.Linear)]
        rule = rule_for(found.magnitudes, [layer.weight.detach() for layer in layers], mixture)
        rules |= dict.fromkeys(found.layers, rule)
    return rules


def convert(model: Any, rules: Mapping[str, InputRule]) -> None:
    """Replace a CPU model's linear layers by int8 ones; layers without a rule have no outliers to care for."""
    quantizer, no_rule = RowQuantizer(), InputRule()
    head = model.get_output_embeddings()

    def replacement(name: str, layer: nn.Linear) -> Int8Linear:
        dtype = torch.float32 if layer is head else None
        return Int8Linear(layer, rules.get(name, no_rule), quantizer, dtype)

    replace_linears(model, replacement)
    model.to(packed_dtype(model.dtype))
    return_free_memory()


@torch.inference_mode()
def is_faster(model: nn.Module) -> bool:
    """Whether int8 weights are faster than packed ones: a layer of each shape, with few rows, in turns."""
    shapes = {layer.weight.shape: layer for layer in model.modules() if type(layer) is nn.Linear}
    seconds = {"dtype": 0.0, "int8": 0.0}
    for layer in shapes.values():
        dtype = packed_dtype(layer.weight.dtype)
        packed, int8 = PackedLinear(layer, dtype), Int8Linear(layer, InputRule(), RowQuantizer())
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
