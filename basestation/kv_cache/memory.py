"""Memory: how much is free, how much a model needs, and how "out of memory" is recognised."""

import contextlib
import errno
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from basestation.sizes import parse_kv_memory, readable_size
from basestation.target.packed_linear import packed_bytes
from basestation.target.quantized_weights import quantization_method, quantized_bytes
from basestation.target.tensor_parallel import Share, split
from common.container_memory import within_limits
from protocol.errors import ModelError

_KV_SHARE = {"cuda": 0.9, "cpu": 0.5}
_OUT_OF_MEMORY = re.compile(
    r"not enough memory|can't allocate memory|CUDA error: out of memory|CU(BLAS|DNN|SPARSE|SOLVER)_STATUS_ALLOC_FAILED"
    r"|bad_alloc",
    re.IGNORECASE,
)


class OutOfMemory(Exception):  # noqa: N818 - expected under load; the engine handles it
    """A forward pass needs more memory than is free."""


@contextlib.contextmanager
def catch_out_of_memory() -> Iterator[None]:
    """Raise ``OutOfMemory`` for the different errors with which PyTorch, NumPy and the system report it."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        torch.cuda.empty_cache()
        raise OutOfMemory(str(error)) from error
    except MemoryError as error:
        raise OutOfMemory(str(error) or "the host has too little memory") from error  # Python's own has no text
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise OutOfMemory(str(error)) from error


def map_memory(size: int) -> mmap.mmap:
    """Map ``size`` bytes of anonymous memory: what is never written takes no memory, and parts can be given back.

    A huge page would take 2 MiB for each small part that is written.

    Raises:
        OSError: there is not enough memory.
    """
    memory = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def free_memory(placement: torch.device) -> int:
    """Free bytes on a PyTorch device; a container's limit counts."""
    if placement.type == "cuda":
        return int(torch.cuda.mem_get_info(placement)[0])
    return within_limits(psutil.virtual_memory().available)


def kv_budget(kv_memory: str, placement: torch.device, weights: int = 0) -> int:
    """Bytes for the KV pool: the given size, or with ``auto`` a share of the memory that is free now.

    Args:
        kv_memory: the option.
        placement: the PyTorch device.
        weights: bytes of the weights, if they are not loaded yet.

    Raises:
        SettingsError: ``kv_memory`` is not a size.
    """
    size = parse_kv_memory(kv_memory)
    if size is not None:
        return size
    return int((free_memory(placement) - weights) * _KV_SHARE.get(placement.type, 0.5))


def parameter_count(config: Any, ranks: int = 1) -> int:
    """Parameters of a model, or of the largest share where it is split over ranks, without allocating it."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    if ranks > 1:
        split(skeleton, Share(0, ranks))
    return sum(one.numel() for one in skeleton.parameters())


def check_host(needed: int) -> None:
    """Refuse weights that do not fit into the host's memory on their way to a GPU.

    Raises:
        ModelError: with both sizes.
    """
    free = free_memory(torch.device("cpu"))
    if needed > free:
        raise ModelError(
            f"loading the weights takes {readable_size(needed)} of the host's memory at once, and "
            f"{readable_size(free)} are free; free some memory"
        )


def check_fits(
    config: Any,
    dtype: torch.dtype,
    placement: torch.device,
    folder: Path | None = None,
    ranks: int = 1,
    int8: bool = False,
) -> int:
    """Refuse a model whose weights do not fit, before they are read.

    Args:
        config: of the model.
        dtype: of its weights, where they are not quantised.
        placement: where they go.
        folder: with its files, which say how large quantised weights are.
        ranks: over which it is split.
        int8: whether its linear layers get int8 weights: one after the other, each smaller than what it replaces.

    Returns:
        The bytes of its weights, or of the largest share.

    Raises:
        ModelError: with both sizes; or they are quantised, and their kernels are missing.
    """
    count, method = parameter_count(config, ranks), quantization_method(config)
    each = packed_bytes(dtype) if placement.type == "cpu" and not int8 else dtype.itemsize
    needed, free = count * each, free_memory(placement)
    if method is not None and folder is not None:
        needed = quantized_bytes(config, folder, count * dtype.itemsize, placement)
    if needed > free:
        precision = str(dtype).removeprefix("torch.") if method is None else f"the form of {method}"
        raise ModelError(
            f"{count / 1e9:.2f} billion parameters in {precision} take {readable_size(needed)}, "
            f"and {readable_size(free)} are free on {placement}; choose a smaller model or dtype, or free some memory"
        )
    return needed
