"""Where the target runs: a GPU that was asked for and is not there is refused, and ``auto`` says why it is the CPU."""

import logging
from pathlib import Path

import pytest
import torch

from basestation.target import int8_conversion
from basestation.target.placement import choose_dtype, choose_placement, describe_placement, reason_for_cpu
from basestation.target.target_model import TargetModel
from protocol.errors import SettingsError
from tests.sample import DOCKER
from tests.tiny_source import save_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_gpu_that_is_not_there_is_refused() -> None:
    name = "cuda:63" if torch.cuda.is_available() else "cuda"
    with pytest.raises(SettingsError, match=f"torch-device is '{name}'; allowed: auto, cpu or a device"):
        choose_placement(name)


def test_auto_says_why_it_takes_the_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO):
        assert choose_placement("auto") == CPU
    assert f"--torch-device auto takes the CPU: {reason_for_cpu()}" in caplog.text


@pytest.mark.parametrize(
    ("is_built", "version", "reason"),
    [
        (False, "", f"PyTorch {torch.__version__} is built without CUDA"),
        (True, "", "finds no GPU it can use; NVIDIA driver: none"),
        (True, "550.54", "finds no GPU it can use; NVIDIA driver: 550.54"),
    ],
)
def test_the_reason_names_what_is_missing(
    is_built: bool, version: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: is_built)
    monkeypatch.setattr("basestation.target.placement._DRIVER_VERSION", tmp_path / "version")
    if version:
        (tmp_path / "version").write_text(f"{version}\n")
    assert reason in reason_for_cpu()


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_auto_is_float16_where_a_gpu_has_no_bfloat16(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_dtype("auto", CUDA) is expected
    assert choose_dtype("float16", CUDA) is torch.float16


def test_float16_is_refused_on_a_cpu() -> None:
    assert choose_dtype("auto", CPU) is torch.float32
    with pytest.raises(
        SettingsError, match="dtype is 'float16'; allowed: auto, float32, bfloat16, and float16 on CUDA"
    ):
        choose_dtype("float16", CPU)


def test_a_placement_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    assert describe_placement(CPU, torch.float32).keys() == {"torch_device", "dtype", "pytorch", "processor"}
    described = describe_placement(CUDA, torch.bfloat16)
    assert (described["processor"], described["compute_capability"], described["dtype"]) == ("A GPU", "9.0", "bfloat16")


def test_an_image_with_cuda_asks_for_it() -> None:
    last_stage = (DOCKER / "basestation.Dockerfile").read_text(encoding="utf-8").split("\nFROM ")[-1]
    assert "\nARG TORCH=cuda\n" in last_stage
    assert "\nENV EDGEDRAFT_BASESTATION_TORCH_DEVICE=${TORCH}\n" in last_stage


def test_where_int8_weights_are_slower_a_target_is_loaded_as_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_conversion, "may_be_int8", lambda *_: True)
    monkeypatch.setattr(int8_conversion, "is_faster", lambda *_: False)
    target = TargetModel.load(str(save_model(tmp_path)), "auto", "cpu", "16MiB", use_cache=False, weights="auto")
    assert (target.name, target.placement["dtype"]) == (tmp_path.name, "float32")
