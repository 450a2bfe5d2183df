"""Linear layers with int8 weights, for CPUs with int8 dot products: half the bytes of bfloat16, and integer sums.

y = x·Wᵀ becomes (s · t) · Σ q·w: a scale s for each row of x, a scale t for each output channel, and a sum of
integers that is exact. So a row's result does not depend on the rows beside it.

A few values of a row are often far above the others, which leaves these few of 8 bits; which ones differs from token to
token. Therefore rows can be rotated first: each block of columns is multiplied by a Hadamard matrix, which spreads a
large value over the block, and so are the weights, which undoes it (QuaRot, arXiv:2404.00456).
"""

import logging
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from protocol.errors import SettingsError

logger = logging.getLogger(__name__)

WEIGHTS = ("dtype", "int8", "auto")
_LEVELS = 127
_ZERO_POINT = 128  # oneDNN multiplies unsigned rows with signed weights
_MOST_COLUMNS = 64
"""Of a block that is rotated."""
_TINY = torch.finfo(torch.float32).tiny * 2**16  # rows and channels of zeros get this maximum

_BITS = {torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80), torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000)}
"""An integer type, and which of its bits are a number's magnitude, in the order of the numbers, and its exponent."""

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


def may_be_int8(weights: str, placement: torch.device, quantized_by: str | None = None, ranks: int = 1) -> bool:
    """Whether linear layers get int8 weights: with ``auto``, whether they could, and a log line says why not.

    Args:
        weights: of ``WEIGHTS``.
        placement: where the target runs.
        quantized_by: the method by which the checkpoint is quantised, None for none.
        ranks: over which the target is split.

    Raises:
        SettingsError: there is no such kind of weights, or int8 cannot be used.
    """
    if weights not in WEIGHTS:
        raise SettingsError("weights", weights, ", ".join(WEIGHTS))
    if weights == "dtype":
        return False
    obstacle = f"the checkpoint is quantised by {quantized_by!r}" if quantized_by else int8_obstacle(placement)
    if ranks > 1:
        obstacle = "they are not split over ranks (--tensor-parallel)"
    if obstacle:
        if weights == "int8":
            raise SettingsError("weights", "int8", f"dtype or auto: {obstacle}")
        logger.info("weights auto: not int8, because %s", obstacle)
    return obstacle is None


def quantize_weight(weight: Tensor, rotate: bool) -> Quantized:
    """Integers [out_features, in_features], int8, and scales [out_features], float32, of a weight."""
    values = weight.float()
    if rotate:
        values = rotated(values).div_(block_size(values.shape[-1]))
    scales = values.abs().amax(-1).clamp_min_(_TINY) / _LEVELS
    return (values / scales[:, None]).round_().to(torch.int8), scales


def quantize_rows(rows: Tensor, rotate: bool) -> Quantized:
    """Integers [..., n, in_features], uint8 with zero point 128, and scales [..., n, 1], of the rows' dtype."""
    values = rotated(_rounded(rows)) if rotate else rows
    scales = _largest(values).clamp_min_(_TINY).div_(_LEVELS)
    steps = values.to(torch.float32, copy=True).div_(scales)
    # PyTorch converts to int8 three times as fast as to uint8; the sign bit makes up the zero point
    return steps.round_().to(torch.int8).view(torch.uint8).bitwise_xor_(_ZERO_POINT), scales


def _largest(rows: Tensor) -> Tensor:
    """The largest magnitude of each row, [..., n, 1]."""
    integers, magnitude, _ = _BITS[rows.dtype]
    return rows.view(integers).bitwise_and(magnitude).amax(-1, keepdim=True).view(rows.dtype)


def _rounded(rows: Tensor) -> Tensor:
    """Round to multiples of 2⁻¹⁷ of a power of two that is above the row's largest value.

    So a sum of 64 of them is exact in float32, and does not depend on the order in which a kernel adds them.
    """
    integers, _, exponent = _BITS[rows.dtype]
    power = _largest(rows).view(integers).bitwise_and_(exponent).view(rows.dtype)
    coarse = power.mul_(2 * 1.5 * _MOST_COLUMNS)  # its 24 bits end at 2⁻¹⁷
    return rows.to(torch.float32, copy=True).add_(coarse).sub_(coarse).to(rows.dtype)


def rotated(values: Tensor) -> Tensor:
    """Multiply each block of the last dimension by a Hadamard matrix."""
    matrix = _hadamard_matrix(block_size(values.shape[-1]), values.dtype)
    return linear(values.reshape(*values.shape[:-1], -1, len(matrix)), matrix).flatten(-2)


def block_size(columns: int) -> int:
    """How many columns are rotated together: the largest power of two that divides their number, at most 64."""
    return min(_MOST_COLUMNS, columns & -columns)


@cache
def _hadamard_matrix(size: int, dtype: torch.dtype) -> Tensor:
    """Sylvester's symmetric matrix of 1 and -1; its square is ``size`` times the identity."""
    matrix = torch.ones(1, 1, dtype=dtype)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


class RowQuantizer:
    """Quantizes the inputs of a model's layers; keeps the last result, because several layers have the same input."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, bool, Quantized] | None = None

    def quantize(self, rows: Tensor, rotate: bool) -> Quantized:
        """See ``quantize_rows``; the caller must not have changed ``rows`` in place since the last call."""
        if self._last is None or self._last[0] is not rows or self._last[1] is not rotate:
            self._last = rows, rotate, quantize_rows(rows, rotate)
        return self._last[2]


class Int8Linear(nn.Module):
    """A linear layer for inference with a packed int8 weight.

    Args:
        original: whose weight is quantized.
        rotate: whether rows are rotated.
        quantizer: shared by the layers of a model.
        dtype: of the output; None for the input's.
    """

    def __init__(
        self, original: nn.Linear, rotate: bool, quantizer: RowQuantizer, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        integers, self._scales = quantize_weight(original.weight.detach(), rotate)
        self._packed = torch.ops.onednn.qlinear_prepack(integers.contiguous(), None)
        self._zero_points = torch.zeros(len(self._scales), dtype=torch.int64)
        self._bias = None if original.bias is None else original.bias.detach()
        self._rotate, self._quantizer, self._dtype = rotate, quantizer, dtype

    def forward(self, rows: Tensor) -> Tensor:
        """Apply the layer: [..., in_features] to [..., out_features]."""
        integers, scales = self._quantizer.quantize(rows, self._rotate)
        # Σ q·w times the scale of each output channel
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, _ZERO_POINT,
            self._packed, self._scales, self._zero_points,
            None, 1.0, 0, self._dtype or rows.dtype, "none", [], "",
        )  # fmt: skip
        product *= scales  # not fused with a sum, whose rounding could depend on the row's place
        return product if self._bias is None else product.add_(self._bias)
