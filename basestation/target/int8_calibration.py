"""Decides from the passes of a few texts how the inputs of linear layers become integers.

Knows layers and their inputs; not which model they belong to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from basestation.target.agreement import RunsSegments, Texts, run_texts
from basestation.target.int8_linear import InputRule

_LEAST = 1e-3
"""Columns with less than this part of the mean are smoothed as if they had it."""


@dataclass(frozen=True)
class Mixture:
    """What is done for inputs with outliers.

    Attributes:
        smoothing: the exponent of a column's magnitude, from 0, which leaves columns as they are, to 1, which gives all
            of them one magnitude.
        wide_from: columns get 16 bits whose magnitude is at least so many times that of their rows, after smoothing.
        most_wide: the largest share of columns that do.
    """

    smoothing: float
    wide_from: float
    most_wide: float


class LinearInput:
    """The input of one or more linear layers.

    Attributes:
        layers: their names.
    """

    def __init__(self) -> None:
        self.layers: list[str] = []
        self._fourth_moments = torch.zeros(())
        self._rows = 0

    def add(self, rows: Tensor) -> None:
        """Take more rows [..., in_features] into account."""
        squares = rows.float().flatten(0, -2).square()
        means = squares.mean(-1, keepdim=True)
        used = means[:, 0] > 0  # rows of zeros pad a pass
        self._fourth_moments = self._fourth_moments + (squares[used] / means[used]).square().sum(0)
        self._rows += int(used.sum())

    @property
    def magnitudes(self) -> Tensor:
        """Of columns [in_features]: the fourth root of their fourth moment, relative to the rows' root mean square."""
        return (self._fourth_moments / self._rows).pow(0.25)


@torch.inference_mode()
def observe_inputs(model: nn.Module, target: RunsSegments, texts: Texts) -> list[LinearInput]:
    """Measure the inputs of all linear layers in the forward passes of texts."""
    inputs: dict[str, LinearInput] = {}
    with _observed(model, inputs):
        for _ in run_texts(target, texts):
            pass
    return list(inputs.values())


def rule_for(magnitudes: Tensor, weights: Sequence[Tensor], mixture: Mixture) -> InputRule:
    """The rule for an input.

    Args:
        magnitudes: of its columns.
        weights: of the layers that have it, [out_features, in_features].
        mixture: see ``Mixture``.
    """
    smoothing = None
    if mixture.smoothing:
        largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).float()
        least = magnitudes.mean() * _LEAST
        divisors = magnitudes.clamp_min(least).pow(mixture.smoothing) / largest.clamp_min(largest.mean() * _LEAST).pow(
            1 - mixture.smoothing
        )
        smoothing = torch.exp2(-(divisors / divisors.mean()).log2().round()).bfloat16()
        magnitudes = magnitudes * smoothing
    relative = magnitudes / magnitudes.square().mean().sqrt()
    found = relative.topk(int(len(relative) * mixture.most_wide))
    wide = found.indices[found.values >= mixture.wide_from].sort().values
    return InputRule(smoothing, wide if len(wide) else None)


@contextmanager
def _observed(model: nn.Module, inputs: dict[str, LinearInput]) -> Iterator[None]:
    """Add the input of each linear layer in each pass; layers with the same input share one, under the first's name."""
    last: tuple[Tensor | None, LinearInput] = (None, LinearInput())

    def observe(name: str, rows: Tensor) -> None:
        nonlocal last
        if rows is not last[0]:
            last = rows, inputs.setdefault(name, LinearInput())
            last[1].add(rows)
        if name not in last[1].layers:
            last[1].layers.append(name)

    handles = [
        layer.register_forward_pre_hook(lambda _, given, name=name: observe(name, given[0]))
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
