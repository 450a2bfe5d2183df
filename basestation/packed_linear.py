"""Matrix products of a few rows with a large weight, fast on a CPU.

Speculative decoding multiplies a handful of rows at a time: too many for a
matrix-vector product, too few for the libraries' matrix product, which spends
its time rearranging the weight. oneDNN can rearrange ("pack") it once.

In bfloat16 a processor without bfloat16 matrix instructions takes time in
proportion to the rows; there, passes of more than ``_DIRECT_ROWS`` rows use a
packed float32 copy of the weight, which is exact: bfloat16 is a part of float32.
Measured on such a machine (2 cores, 135M parameters, all linear layers), in ms:

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
    """An ``nn.Linear`` for inference on a CPU, with its weight packed once."""

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self.weight = original.weight
        self.bias = original.bias
        self._float_bias = None if original.bias is None else original.bias.detach().float()
        weight = original.weight.detach().float().contiguous()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)

    def forward(self, rows: Tensor) -> Tensor:
        """[…, in] → […, out] in the dtype of ``rows``."""
        if rows.dtype is torch.bfloat16 and rows.numel() <= _DIRECT_ROWS * rows.shape[-1]:
            return linear(rows, self.weight, self.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows.float(), self._packed, self._float_bias, "none", [], ""
        )
        return product.to(rows.dtype)


def pack_linears(model: nn.Module) -> None:
    """Replace every ``nn.Linear`` below ``model``, where oneDNN is there and packing wins."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    dtype = next(model.parameters()).dtype
    if dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
