"""Matrix products of a few rows with a large weight, fast on a CPU.

Speculative decoding multiplies a handful of rows at a time: too many for a
matrix-vector product, too few for the libraries' matrix product, which spends
its time rearranging the weight. oneDNN can rearrange ("pack") it once.

All linear layers of a model with 135M parameters, in ms, on 2 cores with bfloat16 instructions:

=====================  =====  ======  ======  ======  ======
rows                       1       5      16      40      80
=====================  =====  ======  ======  ======  ======
bfloat16                  22      25      32      48      80
bfloat16, packed          10      11      18      33      59
=====================  =====  ======  ======  ======  ======

A bfloat16 model on a processor without such instructions keeps its rounded
weights and computes in float32, which holds every bfloat16 number: there, a
bfloat16 product takes time in proportion to the rows. Only for a row or two is
it the faster one, because it reads half the bytes, and those use it.
In ms, on 2 cores without bfloat16 instructions:

=====================  =====  ======  ======  ======
rows                       1       2       5       9
=====================  =====  ======  ======  ======
float32                   41      70      72      83
float32, packed           32      35      39      56
bfloat16                  22      30      77     147
=====================  =====  ======  ======  ======
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_DIRECT_ROWS = 2
_PACKED_FOR_ROWS = 16  # the layout of the packed weight is chosen for this many rows and serves any number


class PackedLinear(nn.Module):
    """An ``nn.Linear`` for inference on a CPU: the weight packed once, rows in and out of ``dtype``."""

    def __init__(self, original: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        weight = original.weight.detach()
        self._bias = None if original.bias is None else original.bias.detach().to(dtype)
        self._direct = None if weight.dtype is dtype else weight  # no parameter: it keeps its dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), _PACKED_FOR_ROWS)

    def forward(self, rows: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        if self._direct is not None and rows.numel() <= _DIRECT_ROWS * rows.shape[-1]:
            product = linear(rows.to(self._direct.dtype), self._direct).to(rows.dtype)
            return product if self._bias is None else product + self._bias
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return packed


def packed_bytes(held: torch.dtype) -> int:
    """What a parameter of a linear layer takes on the CPU once it is packed, in bytes."""
    dtype = _packed_dtype(held)
    return dtype.itemsize if dtype is held else dtype.itemsize + held.itemsize


def pack_linears(model: nn.Module) -> None:
    """Make a model on the CPU compute with packed weights, where oneDNN is there."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    dtype = _packed_dtype(next(model.parameters()).dtype)
    parents = [module for module in model.modules() if type(module) is not nn.Linear]  # which are to go one by one
    for module in parents:
        for name in [name for name, child in module.named_children() if type(child) is nn.Linear]:
            setattr(module, name, PackedLinear(getattr(module, name), dtype))
    model.to(dtype)


def _packed_dtype(held: torch.dtype) -> torch.dtype:
    if held is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32
