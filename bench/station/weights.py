"""Int8 weights of a target, by which rows are rotated: the time of passes, and the agreement with the original."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import nn

from basestation.kv_cache.memory import kv_budget
from basestation.target.agreement import answer_prompts, measure_agreement, prompt_ids
from basestation.target.int8_conversion import convert
from basestation.target.int8_linear import Int8Linear, int8_obstacle
from basestation.target.packed_linear import PackedLinear, pack_linears, packed_dtype
from basestation.target.pretrained import read_model
from basestation.target.target_model import TargetModel
from basestation.target.vocabulary import Vocabulary
from bench.grid.ratio import Ratio
from bench.setup.options import JsonOption, TargetOption, check_transformers_target, console, progress_bar
from bench.setup.prompts import prompts_by_category
from bench.setup.results import Results, Row
from bench.station.passes import PackedPassRunner, seconds_of
from protocol.errors import SettingsError

MIXTURES: Mapping[str, Callable[[str], bool]] = {
    "int8": lambda _: False,
    "int8, down_proj rotated": lambda name: name.endswith("down_proj"),
    "int8, down_proj and lm_head rotated": lambda name: name.endswith(("down_proj", "lm_head")),
    "int8, all rotated": lambda _: True,
}
"""Whether the rows of a linear layer are rotated, by its name."""
_PASSES = ((1, 1), (1, 9), (16, 5))
"""Sequences, and tokens of each."""
_DTYPE = torch.bfloat16
_CPU = torch.device("cpu")
_CONTEXT = 256
_KV_MEMORY = "512MiB"
_REPEATS = 15
_WARM_UP = 2


def weights(
    target: TargetOption,
    prompts: Annotated[Path, typer.Option(help="Spec-Bench jsonl file: a category and turns in each line.")],
    per_category: Annotated[int, typer.Option(min=1, help="Prompts of a category, or all where it has fewer.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the original's answers.")] = 20,
    json_file: JsonOption = None,
) -> None:
    """Compare int8 weights with the packed bfloat16 ones they replace: passes of 1, 9 and 80 rows, and agreement.

    A pass with int8 weights and one without take turns, and so do the linear layers alone, which bound what a pass can
    gain. Ratios are medians with a bootstrap 95 % interval. Agreement is with the original's answers at temperature 0,
    teacher-forced: the share of the same most likely tokens, and Σ min(p, q) at temperature 1.
    """
    check_transformers_target(target)
    if obstacle := int8_obstacle(_CPU):
        raise SettingsError("target", target, f"a machine with int8 weights: {obstacle}")
    with progress_bar() as progress:
        task = progress.add_task("int8 weights", total=len(MIXTURES))
        measurement = _Measurement(target, prompts_by_category(prompts, per_category), max_new_tokens)
        rows = []
        for name, rotate in MIXTURES.items():
            rows.append(measurement.row(name, rotate))
            progress.advance(task)
    tokens = measurement.texts.answers.numel()
    results = Results({"target": Path(target).name, "context": _CONTEXT, "teacher_forced_tokens": tokens}, rows)
    results.show(console)
    results.write(json_file)


class _Measurement:
    """The original and its answers."""

    def __init__(self, target: str, by_category: Mapping[str, Sequence[str]], max_new_tokens: int) -> None:
        self._source = target
        model, tokenizer, self._vocabulary = self._read()
        self._widths = [layer.in_features for layer in model.modules() if type(layer) is nn.Linear]
        pack_linears(model)
        self._layers = _layers(model, PackedLinear)
        self._original = self._runner(model, independent_rows=False)
        prompts = [prompt for of_category in by_category.values() for prompt in of_category]
        self.texts = answer_prompts(self._original, prompt_ids(tokenizer, prompts), max_new_tokens)

    def row(self, name: str, rotate: Callable[[str], bool]) -> Row:
        """The row of one mixture."""
        model, _, _ = self._read()
        convert(model, rotate)
        layers, changed = _layers(model, Int8Linear), self._runner(model, independent_rows=True)
        agreement = measure_agreement(changed, self.texts)
        row: Row = {"case": name, "argmax": agreement.argmax, "overlap": agreement.overlap}
        for sequences, new in _PASSES:
            rows = sequences * new
            milliseconds, ratio = self._pass_speeds(changed, sequences, new)
            row |= {f"milliseconds_{rows}_rows": milliseconds, f"over_packed_{rows}_rows": ratio}
            row[f"layers_over_packed_{rows}_rows"] = self._layer_speeds(layers, rows)
        return row

    def _pass_speeds(self, changed: TargetModel, sequences: int, new: int) -> tuple[float, str]:
        """The time of a pass, and how many times that it takes without int8 weights."""
        generator = torch.Generator().manual_seed(0)
        size = changed.vocabulary.size
        tokens = [torch.randint(size, (_CONTEXT + new,), generator=generator).tolist() for _ in range(sequences)]
        runners = [PackedPassRunner(one, tokens, new) for one in (self._original, changed)]
        original, int8 = _in_turns(*(runner.run for runner in runners))
        for runner in runners:
            runner.release()
        return 1e3 * median(int8), str(Ratio.of(original, int8))

    def _layer_speeds(self, layers: Sequence[nn.Module], rows: int) -> str:
        """How many times as long the linear layers alone take without int8 weights."""
        inputs = {width: torch.randn(rows, width, dtype=packed_dtype(_DTYPE)) for width in self._widths}

        def run(layers: Sequence[nn.Module]) -> None:
            for layer, width in zip(layers, self._widths, strict=True):
                layer(inputs[width])

        with torch.inference_mode():
            return str(Ratio.of(*_in_turns(partial(run, self._layers), partial(run, layers))))

    def _read(self) -> tuple[Any, Any, Vocabulary]:
        return read_model(self._source, self._source, _DTYPE, _CPU, int8=True)

    def _runner(self, model: Any, independent_rows: bool) -> TargetModel:
        name, kv_bytes = Path(self._source).name, kv_budget(_KV_MEMORY, _CPU)
        return TargetModel(model, self._vocabulary, name, kv_bytes, independent_rows=independent_rows)


def _layers(model: Any, kind: type[nn.Module]) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, kind)]


def _in_turns(first: Callable[[], object], second: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Seconds of two functions that take turns."""
    pairs = [[seconds_of(one, _CPU) for one in (first, second)] for _ in range(_REPEATS)][_WARM_UP:]
    return [one for one, _ in pairs], [one for _, one in pairs]
