"""Linear layers with int8 weights, for CPUs with int8 dot products: half the bytes of bfloat16, and integer sums.

y = x·Wᵀ becomes (s · t) · Σ q·w: a scale s for each row of x, a scale t for each output channel, and a sum of
integers that is exact. So a row's result does not depend on the rows beside it.

Input columns whose values are far above the others leave these few of 8 bits. There are two remedies, chosen by
``int8_calibration.py``. Each column is divided by a power of two, and its weights are multiplied by it (SmoothQuant,
arXiv:2211.10438). And a few columns have 16 bits: x = s · (254·q₁ + q₂), where q₂ takes part in the product like all
other columns, and q₁ in one of its own with the weights of these columns. Then s is that of the other columns.
"""

import logging
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from protocol.errors import SettingsError

logger = logging.getLogger(__name__)

WEIGHTS = ("dtype", "int8", "auto")
_LEVELS = 127
_DIGIT = 2 * _LEVELS  # what a first digit counts, so that the second one has at most 7 bits and a sign
_ZERO_POINT = 128  # oneDNN multiplies unsigned rows with signed weights
_TINY = torch.finfo(torch.float32).tiny * 2**16  # rows and channels of zeros get this maximum

Quantized: TypeAlias = tuple[Tensor, Tensor]
"""Integers and their scales."""


def int8_obstacle(placement: torch.device) -> str | None:
    """Why int8 weights cannot be used; None if they can."""
    if placement.type != "cpu":
        return f"they are for a CPU, and the target runs on {placement}"
    if not torch.cpu._is_vnni_supported():
        # without VNNI oneDNN adds pairs of products in 16 bits, which saturate
        return "the processor has no int8 dot product for them (AVX-512 VNNI or AMX)"
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return f"PyTorch {torch.__version__} has no onednn::qlinear_prepack; install another version"
    return None


def may_be_int8(weights: str, placement: torch.device, quantized_by: str | None = None) -> bool:
    """Whether linear layers get int8 weights: with ``auto``, whether they could, and a log line says why not.

    Args:
        weights: of ``WEIGHTS``.
        placement: where the target runs.
        quantized_by: the method by which the checkpoint is quantised, None for none.

    Raises:
        SettingsError: there is no such kind of weights, or int8 cannot be used.
    """
    if weights not in WEIGHTS:
        raise SettingsError("weights", weights, ", ".join(WEIGHTS))
    if weights == "dtype":
        return False
    obstacle = f"the checkpoint is quantised by {quantized_by!r}" if quantized_by else int8_obstacle(placement)
    if obstacle:
        if weights == "int8":
            raise SettingsError("weights", "int8", f"dtype or auto: {obstacle}")
        logger.info("weights auto: not int8, because %s", obstacle)
    return obstacle is None


def quantize_weight(weight: Tensor, smoothing: Tensor | None = None) -> Quantized:
    """Integers [out_features, in_features], int8, and scales [out_features], float32, of a weight.

    Args:
        weight: of a linear layer.
        smoothing: [in_features], what its input is multiplied by.
    """
    values = weight.float() if smoothing is None else weight.float() / smoothing
    scales = values.abs().amax(-1).clamp_min_(_TINY) / _LEVELS
    return (values / scales[:, None]).round_().to(torch.int8), scales


@dataclass(frozen=True, eq=False)
class InputRule:
    """How the inputs of some linear layers become integers.

    Attributes:
        smoothing: [in_features], bfloat16, powers of two that columns are multiplied by; None for none.
        wide: the columns that have 16 bits, int64; None for none.
    """

    smoothing: Tensor | None = None
    wide: Tensor | None = None


@dataclass(frozen=True)
class QuantizedRows:
    """Rows as integers, uint8 with zero point 128.

    Attributes:
        integers: [..., n, in_features].
        first: [..., n, columns]: the first digits of columns with 16 bits; None if there are none.
        scales: [..., n, 1], of the rows' dtype.
    """

    integers: Tensor
    first: Tensor | None
    scales: Tensor


def quantize_rows(rows: Tensor, rule: InputRule) -> QuantizedRows:
    """Quantize rows [..., n, in_features]."""
    if rule.smoothing is not None:
        rows = rows * rule.smoothing
    if rule.wide is None:
        scales = (_largest(rows) / _LEVELS).to(rows.dtype)
        return QuantizedRows(_unsigned(rows.to(torch.float32, copy=True).mul_(scales.float().reciprocal())), None, scales)
    values = rows.to(torch.float32, copy=True)
    outliers = values[..., rule.wide]
    values.index_fill_(-1, rule.wide, 0)
    largest = torch.maximum(_largest(values) / _LEVELS, _largest(outliers) / (_LEVELS * _DIGIT))
    scales = largest.to(rows.dtype)
    steps = scales.float().reciprocal()
    outliers *= steps
    first = (outliers / _DIGIT).round_()
    values *= steps
    values.index_copy_(-1, rule.wide, outliers - first * _DIGIT)
    return QuantizedRows(_unsigned(values), _unsigned(first), scales)


def _largest(values: Tensor) -> Tensor:
    """The largest magnitude of each row, [..., n, 1], float32; rows of zeros get a tiny one."""
    largest: Tensor = torch.linalg.vector_norm(values, torch.inf, -1, keepdim=True)
    return largest.float().clamp_min_(_TINY)


def _unsigned(values: Tensor) -> Tensor:
    """Round to integers, in place, and add the zero point."""
    return values.add_(_ZERO_POINT + 0.5).to(torch.uint8)


class RowQuantizer:
    """Quantizes the inputs of a model's layers; keeps the last result, because several layers have the same input."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, InputRule, QuantizedRows] | None = None

    def quantize(self, rows: Tensor, rule: InputRule) -> QuantizedRows:
        """See ``quantize_rows``; the caller must not have changed ``rows`` in place since the last call."""
        if self._last is None or self._last[0] is not rows or self._last[1] is not rule:
            self._last = rows, rule, quantize_rows(rows, rule)
        return self._last[2]


class Int8Linear(nn.Module):
    """A linear layer for inference with a packed int8 weight.

    Args:
        original: whose weight is quantized.
        rule: for its input.
        quantizer: shared by the layers of a model.
        dtype: of the output; None for the input's.
    """

    def __init__(
        self, original: nn.Linear, rule: InputRule, quantizer: RowQuantizer, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        integers, self._scales = quantize_weight(original.weight.detach(), rule.smoothing)
        self._packed = torch.ops.onednn.qlinear_prepack(integers.contiguous(), None)
        self._zero_points = torch.zeros(len(self._scales), dtype=torch.int64)
        self._first = None
        if rule.wide is not None:
            self._first = torch.ops.onednn.qlinear_prepack(integers[:, rule.wide].contiguous(), None)
        self._bias = None if original.bias is None else original.bias.detach().float()
        self._rule, self._quantizer, self._dtype = rule, quantizer, dtype

    def forward(self, rows: Tensor) -> Tensor:
        """Apply the layer: [..., in_features] to [..., out_features]."""
        dtype = self._dtype or rows.dtype
        quantized = self._quantizer.quantize(rows, self._rule)
        if self._first is not None and quantized.first is not None:
            product = self._product(quantized.integers, self._packed, self._scales, torch.float32)
            product += self._product(quantized.first, self._first, self._scales * _DIGIT, torch.float32)
        else:
            product = self._product(quantized.integers, self._packed, self._scales, dtype)
        product *= quantized.scales  # not fused with a sum, whose rounding could depend on the row's place
        return (product if self._bias is None else product.add_(self._bias)).to(dtype)

    def _product(self, integers: Tensor, packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Σ q·w times the scale of each output channel: [..., n, in_features], uint8, to [..., n, out_features]."""
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, _ZERO_POINT,
            packed, scales, self._zero_points,
            None, 1.0, 0, dtype, "none", [], "",
        )  # fmt: skip
        return product
