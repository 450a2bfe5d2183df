"""The device says what ONNX Runtime's CUDA provider lacks, before it would run on the CPU in silence."""

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from device.drafting import cuda_provider
from device.drafting.cuda_provider import check_cuda, gpu_code
from device.drafting.draft_model import DraftModel
from protocol.errors import SettingsError
from tests.tiny_bundle import one_word, write_bundle

PTX, BINARY = 1, 2


def library(folder: Path, *entries: tuple[int, int]) -> Path:
    """A file with the names of two libraries and a fat binary with ``entries`` of a kind and an architecture."""
    code = b"".join(struct.pack("<HHIQ12xI", kind, 1, 64, 8, sm).ljust(72, b"\0") for kind, sm in entries)
    path = folder / "libonnxruntime_providers_cuda.so"
    path.write_bytes(
        b"\x7fELF\0libcudart.so.12\0libcudart.so.13\0libcudnn.so.9\0"
        + struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(code))
        + code
    )
    return path


class Driver:
    """CUDA's driver with one GPU, or with an error."""

    def __init__(self, capability: tuple[int, int], error: int = 0) -> None:
        self._capability = dict(zip((75, 76), capability, strict=True))
        self._error = error

    def cuInit(self, flags: int) -> int:  # noqa: N802 - CUDA's name
        return self._error

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 1
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:  # noqa: N802
        value._obj.value = self._capability[attribute]
        return 0


def loader(driver: Driver | None, *missing: str) -> Callable[[str], Any]:
    def load(name: str) -> Any:
        if name in missing or (name == "libcuda.so.1" and driver is None):
            raise OSError(f"{name}: cannot open shared object file")
        return driver if name == "libcuda.so.1" else ctypes

    return load


@pytest.mark.parametrize(
    ("entries", "gpu", "runs"),
    [
        ([(BINARY, 87)], (8, 7), True),
        ([(BINARY, 80), (BINARY, 86)], (8, 7), False),  # a Jetson's binaries are its own
        ([(BINARY, 80)], (8, 9), True),
        ([(BINARY, 89)], (8, 0), False),
        ([(BINARY, 89), (BINARY, 90), (BINARY, 120), (BINARY, 121)], (11, 0), False),  # onnxruntime-gpu 1.31.1
        ([(PTX, 80)], (8, 7), True),
        ([(PTX, 90)], (8, 7), False),
        ([(BINARY, 110)], (11, 0), True),
        ([], (8, 7), False),
    ],
)
def test_code_runs_on_gpus_that_it_was_compiled_for(
    entries: list[tuple[int, int]], gpu: tuple[int, int], runs: bool, tmp_path: Path
) -> None:
    assert gpu_code(library(tmp_path, *entries)).runs_on(gpu) is runs


@pytest.mark.parametrize(
    ("driver", "missing", "words"),
    [
        (Driver((8, 7)), ["libcudnn.so.9"], "libcudnn.so.9 is not installed"),
        (None, [], "the driver libcuda.so.1 is not there"),
        (Driver((8, 7), error=100), [], "the driver reports CUDA error 100"),
        (Driver((11, 0)), [], r"compute capability is 11\.0 \(ONNX Runtime has code for 8\.7\)"),
    ],
)
def test_what_a_gpu_lacks_is_named(driver: Driver | None, missing: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=words):
        check_cuda("CUDAExecutionProvider", library(tmp_path, (BINARY, 87)), loader(driver, *missing))


def test_tensorrt_needs_its_own_libraries_too(tmp_path: Path) -> None:
    cuda = library(tmp_path, (BINARY, 87))
    cuda.with_name("libonnxruntime_providers_tensorrt.so").write_bytes(b"\x7fELF\0libnvinfer.so.10\0")
    load = loader(Driver((8, 7)), "libnvinfer.so.10")
    check_cuda("CUDAExecutionProvider", cuda, load)
    with pytest.raises(SettingsError, match=r"libnvinfer\.so\.10 is not installed"):
        check_cuda("TensorrtExecutionProvider", cuda, load)


def test_a_gpu_with_libraries_driver_and_code_is_accepted(tmp_path: Path) -> None:
    check_cuda("CUDAExecutionProvider", library(tmp_path, (BINARY, 87)), loader(Driver((8, 7)), "libcudart.so.12"))


def test_an_onnx_runtime_without_code_for_the_boards_fails_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = library(tmp_path, (BINARY, 89), (BINARY, 90))
    monkeypatch.setattr(cuda_provider.gpu_code, "__defaults__", (path,))
    cuda_provider.check_code("8.9")
    with pytest.raises(SettingsError, match=r"code for 8\.7, 11\.0 .*is for 8\.9, 9\.0"):
        cuda_provider.check_code("8.7 11.0")


def test_a_device_starts_no_model_on_a_gpu_that_cannot_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "bundle", one_word("cat"))
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(SettingsError, match="CPUExecutionProvider"):
        DraftModel(bundle, providers=["CUDAExecutionProvider"])


def test_a_provider_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "bundle", one_word("cat"))
    session = onnxruntime.InferenceSession
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["SomeExecutionProvider"])
    monkeypatch.setattr(
        "onnxruntime.InferenceSession",
        lambda path, options, providers: session(path, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(SettingsError, match="could not start it"):
        DraftModel(bundle, providers=["SomeExecutionProvider"])
