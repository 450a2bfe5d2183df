"""Linear layers for a few rows at a time on a CPU, with weights packed by oneDNN.

Speculative decoding multiplies a few rows at a time: too many for a
matrix-vector product, too few to amortise the rearranged copy of the weight
that a matrix product makes. oneDNN can make ("pack") that copy once.

All linear layers of a model with 135M parameters, in ms, on 2 cores with bfloat16 instructions:

=====================  =====  ======  ======  ======  ======
rows                       1       5      16      40      80
=====================  =====  ======  ======  ======  ======
bfloat16                  22      25      32      48      80
bfloat16, packed          10      11      18      33      59
=====================  =====  ======  ======  ======  ======

Without such instructions the time of a bfloat16 product grows in proportion to
the rows. A bfloat16 model then keeps its rounded weights and computes in
float32, which represents every bfloat16 number exactly; only one or two rows use
the bfloat16 weights, because they are half the bytes to read.
In ms, on 2 cores without bfloat16 instructions:

=====================  =====  ======  ======  ======
rows                       1       2       5       9
=====================  =====  ======  ======  ======
float32                   41      70      72      83
float32, packed           32      35      39      56
bfloat16                  22      30      77     147
=====================  =====  ======  ======  ======
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_DIRECT_ROWS = 2
_PACKED_FOR_ROWS = 16  # the packed layout is optimised for this many rows and works for any number


class PackedLinear(nn.Module):
    """An ``nn.Linear`` for inference on a CPU, with a packed weight; input and output are of ``dtype``."""

    def __init__(self, original: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        weight = original.weight.detach()
        self._bias = None if original.bias is None else original.bias.detach().to(dtype)
        self._direct = None if weight.dtype is dtype else weight  # not a parameter: it keeps its dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), _PACKED_FOR_ROWS)

    def forward(self, rows: Tensor) -> Tensor:
        """Apply the layer: […, in_features] to […, out_features]."""
        if self._direct is not None and rows.numel() <= _DIRECT_ROWS * rows.shape[-1]:
            product = linear(rows.to(self._direct.dtype), self._direct).to(rows.dtype)
            return product if self._bias is None else product + self._bias
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return packed


def packed_bytes(held: torch.dtype) -> int:
    """Bytes per parameter of a packed linear layer whose original dtype is ``held``."""
    dtype = packed_dtype(held)
    return dtype.itemsize if dtype is held else dtype.itemsize + held.itemsize


def pack_linears(model: nn.Module) -> None:
    """Replace a CPU model's linear layers by packed ones, if oneDNN is available."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    dtype = packed_dtype(next(model.parameters()).dtype)
    replace_linears(model, lambda _, layer: PackedLinear(layer, dtype))
    model.to(dtype)


def replace_linears(model: nn.Module, replacement: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Replace each linear layer by the one that ``replacement`` makes of its name and itself.

    Each layer is freed before the next one is replaced.
    """
    for prefix, module in [
        (prefix, module) for prefix, module in model.named_modules() if type(module) is not nn.Linear
    ]:
        for name in [name for name, child in module.named_children() if type(child) is nn.Linear]:
            full_name = f"{prefix}.{name}" if prefix else name
            setattr(module, name, replacement(full_name, getattr(module, name)))


def packed_dtype(held: torch.dtype) -> torch.dtype:
    """The dtype in which a CPU computes with packed layers whose original dtype is ``held``."""
    if held is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32
