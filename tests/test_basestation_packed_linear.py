"""Packed products against plain ones."""

import pytest
import torch
from torch import nn

from basestation.packed_linear import PackedLinear, pack_linears


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 80])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("held", "computed"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_a_packed_product_is_the_plain_one(rows: int, bias: bool, held: str, computed: str) -> None:
    torch.manual_seed(rows)
    held_in, computed_in = getattr(torch, held), getattr(torch, computed)
    original = nn.Linear(64, 48, bias=bias).to(held_in)
    row = torch.randn(1, rows, 64).to(computed_in)
    with torch.inference_mode():
        expected = original.double()(row.double())
        product = PackedLinear(original.to(held_in), computed_in)(row)
    assert product.dtype is computed_in
    assert product.double() == pytest.approx(expected, abs=1e-5 if held == computed == "float32" else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_a_model_leaves_no_plain_linear_and_one_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))).to(dtype)
    row = torch.randn(3, 8).to(dtype)
    with torch.inference_mode():
        expected = model(row).float()
        pack_linears(model)
        product = model(row.to(next(model.parameters()).dtype)).float()
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert product == pytest.approx(expected, abs=0.05 if dtype is torch.bfloat16 else 1e-5)
