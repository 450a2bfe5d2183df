"""Where the target runs and in which data type.

Knows PyTorch devices and data types; not models.
"""

import logging
import os
from pathlib import Path

import torch

from common.error_text import first_line
from protocol.errors import SettingsError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DRIVER_VERSION = Path("/sys/module/nvidia/version")


def choose_placement(torch_device: str) -> torch.device:
    """The PyTorch device with that name; ``auto`` is CUDA if available, else the CPU, and a log line says why.

    Raises:
        SettingsError: this machine has no such device.
    """
    if torch_device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        logger.info("--torch-device auto takes the CPU: %s", reason_for_cpu())
        return torch.device("cpu")
    try:
        placement = torch.device(torch_device)
        torch.empty(0, device=placement)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            "torch-device", torch_device, f"auto, cpu or a device of this machine ({first_line(error)})"
        ) from error
    return placement


def reason_for_cpu() -> str:
    """Why ``auto`` is the CPU."""
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return f"PyTorch {torch.__version__} is built without CUDA"
    driver = driver_version()
    return f"PyTorch {torch.__version__} finds no GPU it can use; NVIDIA driver: {driver or 'none'}"


def driver_version() -> str | None:
    """The version of the NVIDIA driver, None without one."""
    return _DRIVER_VERSION.read_text(encoding="utf-8").strip() if _DRIVER_VERSION.exists() else None


def choose_dtype(dtype: str, placement: torch.device, int8: bool = False) -> torch.dtype:
    """The data type with that name; ``auto`` is float32 on a CPU, and on CUDA bfloat16, or float16 where that is slow.

    Args:
        dtype: the option.
        placement: where the target runs.
        int8: whether its linear layers have int8 weights; ``auto`` is then bfloat16.

    Raises:
        SettingsError: targets do not run in this type there.
    """
    on_cuda = placement.type == "cuda"
    if dtype == "auto":
        if not on_cuda:
            return torch.bfloat16 if int8 else torch.float32
        native = torch.cuda.get_device_capability(placement) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    if dtype not in DTYPES or (dtype == "float16" and not on_cuda):
        allowed = ", ".join(name for name in DTYPES if on_cuda or name != "float16")
        raise SettingsError("dtype", dtype, f"auto, {allowed}{'' if on_cuda else ', and float16 on CUDA'}")
    return DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of one of ``DTYPES``."""
    return str(dtype).removeprefix("torch.")


def describe_placement(placement: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What the log and the metrics say about a placement, by name."""
    described = {"torch_device": str(placement), "dtype": dtype_name(dtype), "pytorch": torch.__version__}
    if placement.type != "cuda":
        return {**described, "processor": f"{len(os.sched_getaffinity(0))} cores"}
    return {
        **described,
        "processor": torch.cuda.get_device_name(placement),
        "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability(placement)),
        "driver": driver_version() or "unknown",
    }
