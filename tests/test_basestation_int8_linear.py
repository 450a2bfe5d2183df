"""Int8 layers against a slow twin that sums integers in NumPy; rows are independent of each other."""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from basestation.target import int8_linear
from basestation.target.int8_linear import (
    InputRule,
    Int8Linear,
    QuantizedRows,
    RowQuantizer,
    int8_obstacle,
    may_be_int8,
    quantize_rows,
    quantize_weight,
)
from protocol.errors import SettingsError

CPU = torch.device("cpu")
needs_vnni = pytest.mark.skipif(int8_obstacle(CPU) is not None, reason=str(int8_obstacle(CPU)))
IN, OUT = 96, 56
SMOOTHING = torch.exp2(torch.arange(IN) % 5 - 2).bfloat16()
WIDE = torch.tensor([3, 7, 40])
PLAIN = InputRule()
RULES = [PLAIN, InputRule(smoothing=SMOOTHING), InputRule(wide=WIDE), InputRule(SMOOTHING, WIDE)]


def layer(rule: InputRule = PLAIN, *, bias: bool = False) -> tuple[nn.Linear, Int8Linear]:
    torch.manual_seed(1)
    original = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    return original, Int8Linear(original, rule, RowQuantizer())


def rows(count: int, *, outlier: float = 1.0) -> Tensor:
    torch.manual_seed(count)
    values = torch.randn(count, IN)
    values[:, 7] *= outlier
    return values


def slow_twin(original: nn.Linear, row: Tensor, rule: InputRule) -> npt.NDArray[np.float32]:
    """One row at a time, summed in int32."""
    weight, scales = (one.numpy() for one in quantize_weight(original.weight, rule.smoothing))
    quantized = quantize_rows(row[None], rule)

    def product(integers: Tensor, used: npt.NDArray[np.int8], factors: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        sums = (integers[0].numpy().astype(np.int32) - 128) @ used.astype(np.int32).T
        return np.asarray(sums.astype(np.float32) * factors)

    total = product(quantized.integers, weight, scales)
    if rule.wide is not None and quantized.first is not None:
        total = total + product(quantized.first, weight[:, rule.wide.numpy()], scales * np.float32(254))
    return np.asarray(total * quantized.scales[0, 0].numpy())


@needs_vnni
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [1, 2, 5, 9, 16, 33, 80])
def test_a_product_is_the_sum_of_integers(count: int, rule: InputRule) -> None:
    original, quantized = layer(rule)
    found = quantized(rows(count, outlier=30)).numpy()
    for row, product in zip(rows(count, outlier=30), found, strict=True):
        np.testing.assert_array_equal(product, slow_twin(original, row, rule))


@needs_vnni
def test_the_largest_integers_do_not_saturate() -> None:
    """Without VNNI, oneDNN adds pairs of 8-bit products in 16 bits."""
    original = nn.Linear(4096, OUT, bias=False).requires_grad_(False)
    original.weight.fill_(127)
    product = Int8Linear(original, PLAIN, RowQuantizer())(torch.ones(3, 4096))
    assert product == pytest.approx(torch.full((3, OUT), 127.0 * 4096), rel=1e-6)


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, rule: InputRule) -> None:
    _, quantized = layer(rule, bias=True)
    together = rows(80).to(dtype)
    product = quantized(together)
    assert product.dtype is dtype
    for count in (1, 3, 16):
        for start in (0, 11, 80 - count):
            part = slice(start, start + count)
            assert torch.equal(quantized(together[part]), product[part])


@needs_vnni
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_product_is_close_to_the_original(rule: InputRule, bias: bool) -> None:
    original, quantized = layer(rule, bias=bias)
    assert quantized(rows(9)) == pytest.approx(original(rows(9)), abs=0.15)


@needs_vnni
def test_logits_stay_in_float32_where_rows_are_bfloat16() -> None:
    torch.manual_seed(1)
    original = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    product = Int8Linear(original, PLAIN, RowQuantizer(), torch.float32)(rows(3).bfloat16())
    assert product.dtype is torch.float32
    assert not torch.equal(product, product.bfloat16().float())


@needs_vnni
@pytest.mark.parametrize(
    "rule", [InputRule(wide=WIDE), InputRule(smoothing=torch.ones(IN).index_fill(0, WIDE, 1 / 64))]
)
def test_both_remedies_keep_the_small_values_beside_large_ones(rule: InputRule) -> None:
    outliers = rows(9, outlier=100.0)
    (original, plain), (_, remedied) = layer(), layer(rule)
    integers, scales = quantize_weight(original.weight, rule.smoothing)
    weight = integers * scales[:, None] * (1 if rule.smoothing is None else rule.smoothing)
    errors = [(one(outliers) - outliers @ weight.T).abs().max() for one in (plain, remedied)]
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("wide", [None, torch.tensor([1]), torch.tensor([0, 1, 2, 3])])
@pytest.mark.parametrize("large", [1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_reach_both_ends_and_no_further(wide: Tensor | None, large: float, dtype: torch.dtype) -> None:
    values = torch.tensor([[-3.0, large, 3.0, -large], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    quantized = quantize_rows(values, InputRule(wide=wide))
    digits = quantized.integers.int() - 128
    assert digits.abs().max() <= 127
    assert (digits[1] == 0).all()
    assert quantized.first is None or (quantized.first.int() - 128).abs().max() <= 127
    assert torch.isfinite(quantized.scales).all()
    first = torch.zeros(values.shape)
    if wide is not None and quantized.first is not None:
        first[:, wide] = quantized.first.float() - 128
    found = (254 * first + digits) * quantized.scales.float()
    assert found == pytest.approx(values.float(), abs=float(quantized.scales.max()) * 0.51)


@needs_vnni
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rule", RULES)
def test_a_row_that_is_not_finite_stays_so_and_alone(value: float, rule: InputRule) -> None:
    """The engine finds such a session by its logits."""
    _, quantized = layer(rule)
    damaged = rows(3)
    damaged[1, 5] = value
    product = quantized(damaged)
    assert not torch.isfinite(product[1]).any()
    assert torch.equal(product[[0, 2]], quantized(rows(3))[[0, 2]])


def test_layers_with_the_same_input_and_rule_quantize_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(given: Tensor, rule: InputRule) -> QuantizedRows:
        calls.append(given)
        return quantize_rows(given, rule)

    monkeypatch.setattr(int8_linear, "quantize_rows", counted)
    quantizer, values, others = RowQuantizer(), rows(2), rows(3)
    for given in (values, values, others, values):
        assert torch.equal(quantizer.quantize(given, PLAIN).integers, quantize_rows(given, PLAIN).integers)
    assert quantizer.quantize(values, RULES[2]).first is not None
    assert quantizer.quantize(values, RULES[2]).first is not None
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
