"""Packed linear layers against plain ones."""

from weakref import ref

import pytest
import torch
from torch import nn

from basestation.target.packed_linear import PackedLinear, pack_linears, packed_bytes


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 80])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("held", "computed"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_a_packed_layer_agrees_with_the_plain_one(rows: int, bias: bool, held: str, computed: str) -> None:
    torch.manual_seed(rows)
    held_in, computed_in = getattr(torch, held), getattr(torch, computed)
    original = nn.Linear(64, 48, bias=bias).to(held_in)
    row = torch.randn(1, rows, 64).to(computed_in)
    with torch.inference_mode():
        expected = original.double()(row.double())
        product = PackedLinear(original.to(held_in), computed_in)(row)
    assert product.dtype is computed_in
    assert product.double() == pytest.approx(expected, abs=1e-5 if held == computed == "float32" else 0.02)


def test_each_layer_is_freed_before_the_next_is_packed() -> None:
    """The model is never in memory twice."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    alive = [ref(layer) for layer in model]
    seen = []

    class CountingLinear(PackedLinear):
        def __init__(self, original: nn.Linear, dtype: torch.dtype) -> None:
            seen.append(sum(one() is not None for one in alive))
            super().__init__(original, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("basestation.target.packed_linear.PackedLinear", CountingLinear)
        pack_linears(model)
    assert seen[-1] <= 2


def test_bytes_of_packed_weights() -> None:
    assert packed_bytes(torch.float32) == 4
    assert packed_bytes(torch.bfloat16) == (2 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_a_model_leaves_no_plain_linear_layer_and_one_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))).to(dtype)
    row = torch.randn(3, 8).to(dtype)
    with torch.inference_mode():
        expected = model(row).float()
        pack_linears(model)
        product = model(row.to(next(model.parameters()).dtype)).float()
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert product == pytest.approx(expected, abs=0.05 if dtype is torch.bfloat16 else 1e-5)
