"""Int8 layers against a slow twin that sums integers in NumPy; rows are independent of each other."""

import logging

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from basestation.target import int8_linear
from basestation.target.int8_linear import (
    Int8Linear,
    Quantized,
    RowQuantizer,
    block_size,
    int8_obstacle,
    may_be_int8,
    quantize_rows,
    quantize_weight,
    rotated,
)
from protocol.errors import SettingsError
from tests.tiny_target import CPU

needs_vnni = pytest.mark.skipif(int8_obstacle(CPU) is not None, reason=str(int8_obstacle(CPU)))
IN, OUT = 96, 56


def layer(rotate: bool, *, bias: bool = False, dtype: torch.dtype | None = None) -> tuple[nn.Linear, Int8Linear]:
    torch.manual_seed(1)
    original = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    return original, Int8Linear(original, rotate, RowQuantizer(), dtype)


def rows(count: int, *, outlier: float = 1.0) -> Tensor:
    torch.manual_seed(count)
    values = torch.randn(count, IN)
    values[:, 7] *= outlier
    return values


def slow_twin(original: nn.Linear, row: Tensor, rotate: bool) -> npt.NDArray[np.float32]:
    """One row at a time, summed in int32."""
    weight, scales = (one.numpy() for one in quantize_weight(original.weight, rotate))
    integers, scale = (one[0].numpy() for one in quantize_rows(row[None], rotate))
    sums = (integers.astype(np.int32) - 128) @ weight.astype(np.int32).T
    return np.asarray(sums.astype(np.float32) * scales * scale)


@needs_vnni
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5, 9, 16, 33, 80])
def test_a_product_is_the_sum_of_integers(count: int, rotate: bool) -> None:
    original, quantized = layer(rotate)
    found = quantized(rows(count, outlier=30)).numpy()
    for row, product in zip(rows(count, outlier=30), found, strict=True):
        np.testing.assert_array_equal(product, slow_twin(original, row, rotate))


@needs_vnni
def test_the_largest_integers_do_not_saturate() -> None:
    """Without VNNI, oneDNN adds pairs of 8-bit products in 16 bits."""
    original = nn.Linear(4096, OUT, bias=False).requires_grad_(False)
    original.weight.fill_(127)
    product = Int8Linear(original, False, RowQuantizer())(torch.ones(3, 4096))
    assert product == pytest.approx(torch.full((3, OUT), 127.0 * 4096), rel=1e-6)


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("columns", [IN, 576, 1536])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, rotate: bool, columns: int) -> None:
    torch.manual_seed(1)
    quantized = Int8Linear(nn.Linear(columns, OUT).requires_grad_(False), rotate, RowQuantizer())
    together = torch.randn(80, columns).to(dtype)
    product = quantized(together)
    assert product.dtype is dtype
    for count in (1, 3, 16):
        for start in (0, 11, 80 - count):
            part = slice(start, start + count)
            assert torch.equal(quantized(together[part]), product[part])


@needs_vnni
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rotate", [False, True])
def test_a_product_is_close_to_the_original(rotate: bool, bias: bool) -> None:
    original, quantized = layer(rotate, bias=bias)
    assert quantized(rows(9)) == pytest.approx(original(rows(9)), abs=0.05)


@needs_vnni
def test_logits_stay_in_float32_where_rows_are_bfloat16() -> None:
    _, quantized = layer(True, dtype=torch.float32)
    product = quantized(rows(3).bfloat16())
    assert product.dtype is torch.float32
    assert not torch.equal(product, product.bfloat16().float())


@needs_vnni
def test_rotated_rows_keep_the_small_values_beside_a_large_one() -> None:
    outliers = rows(9, outlier=100.0)
    (original, plain), (_, rotated_layer) = layer(False), layer(True)
    errors = [(one(outliers) - original(outliers)).square().mean().sqrt() for one in (plain, rotated_layer)]
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("columns", [2, 48, 96, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_twice_gives_the_row_back(columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    values = torch.randint(-8, 8, (3, columns)).to(dtype)
    assert torch.equal(rotated(rotated(values)) / block_size(columns), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_so_that_sums_of_a_block_are_exact(dtype: torch.dtype) -> None:
    values = rows(9, outlier=1000.0).to(dtype)
    rounded = vars(int8_linear)["_rounded"](values)
    assert rounded.dtype is dtype
    steps = rounded.double() / 2.0 ** (torch.frexp(values.abs().amax(-1, keepdim=True).float()).exponent - 17)
    assert torch.equal(steps, steps.round())
    assert float((rounded - values).abs().max()) <= float(values.abs().max()) * 2**-17


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("large", [1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_reach_both_ends_and_no_further(rotate: bool, large: float, dtype: torch.dtype) -> None:
    values = torch.tensor([[-3.0, large, 3.0, -large], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    unsigned, scales = quantize_rows(values, rotate)
    integers = unsigned.int() - 128
    assert integers[0].abs().max() == 127
    assert (integers[1] == 0).all()
    assert torch.isfinite(scales).all()
    expected = (rotated(values) if rotate else values).float()
    assert integers * scales.float() == pytest.approx(expected, abs=float(scales.max()) * 0.51)


@needs_vnni
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rotate", [False, True])
def test_a_row_that_is_not_finite_stays_so_and_alone(value: float, rotate: bool) -> None:
    """The engine finds such a session by its logits."""
    _, quantized = layer(rotate)
    damaged = rows(3)
    damaged[1, 5] = value
    product = quantized(damaged)
    assert not torch.isfinite(product[1]).any()
    assert torch.equal(product[[0, 2]], quantized(rows(3))[[0, 2]])


def test_layers_with_the_same_input_quantize_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(given: Tensor, rotate: bool) -> Quantized:
        calls.append(given)
        return quantize_rows(given, rotate)

    monkeypatch.setattr(int8_linear, "quantize_rows", counted)
    quantizer, values, others = RowQuantizer(), rows(2), rows(3)
    for given in (values, values, others, values):
        assert torch.equal(quantizer.quantize(given, True)[0], quantize_rows(given, True)[0])
    assert torch.equal(quantizer.quantize(values, False)[0], quantize_rows(values, False)[0])
    assert len(calls) == 4


def test_machines_without_int8_dot_products_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(SettingsError, match="no int8 dot product"):
        may_be_int8("int8", CPU)
    with pytest.raises(SettingsError, match="runs on cuda"):
        may_be_int8("int8", torch.device("cuda"))
    assert not may_be_int8("dtype", CPU)


def test_a_version_of_pytorch_without_the_operation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.ops, "onednn", object())
    with pytest.raises(SettingsError, match=f"PyTorch {torch.__version__.split('+')[0]}"):
        may_be_int8("int8", CPU)


def test_quantised_checkpoints_and_unknown_weights_are_refused() -> None:
    with pytest.raises(SettingsError, match="quantised by 'gptq'"):
        may_be_int8("int8", CPU, "gptq")
    with pytest.raises(SettingsError, match="dtype, int8, auto"):
        may_be_int8("int4", CPU)


def test_auto_names_the_obstacle_and_takes_the_dtype(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with caplog.at_level(logging.INFO, logger="basestation.target.int8_linear"):
        assert not may_be_int8("auto", CPU)
    assert "no int8 dot product" in caplog.text
