"""From the host to the device of a pass: numbers go there in one copy, which the pass does not wait for."""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 16
"""Each array begins at a multiple of it, in bytes."""


class HostTransfer:
    """Arrays of the host for a device, all in one copy: when the first of them is used.

    Args:
        torch_device: where they go.

    Attributes:
        copies: made so far, 0 or 1.
    """

    def __init__(self, torch_device: torch.device) -> None:
        self.copies = 0
        self._torch_device = torch_device
        self._arrays: list[npt.NDArray[Any]] = []
        self._placed: list[Tensor] = []

    def add(self, array: npt.NDArray[Any]) -> "Placed":
        """Add an array, before any is used."""
        assert self.copies == 0, "arrays are added before the first of them is used"
        self._arrays.append(array)
        return Placed(self, len(self._arrays) - 1)

    def placed(self, index: int) -> Tensor:
        """The array with this index on the device."""
        if self.copies == 0:
            on_host = self._torch_device.type == "cpu"
            self._placed = shared(self._arrays) if on_host else in_one_copy(self._arrays, self._torch_device)
            self.copies = 1
        return self._placed[index]


class Placed:
    """An array of a ``HostTransfer``."""

    def __init__(self, transfer: HostTransfer, index: int) -> None:
        self._transfer, self._index = transfer, index

    @property
    def tensor(self) -> Tensor:
        """The array on the device."""
        return self._transfer.placed(self._index)


def shared(arrays: Sequence[npt.NDArray[Any]]) -> list[Tensor]:
    """Arrays as tensors on the CPU, in the same memory."""
    return list(map(torch.from_numpy, arrays))


def in_one_copy(arrays: Sequence[npt.NDArray[Any]], torch_device: torch.device) -> list[Tensor]:
    """Arrays of any shapes and data types on a device, as parts of one buffer."""
    starts = [0, *accumulate(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)]
    on_cuda = torch_device.type == "cuda"
    staging = torch.empty(starts[-1], dtype=torch.uint8, device="cpu", pin_memory=on_cuda)
    staged = staging.numpy()
    for start, array in zip(starts, arrays, strict=False):
        staged[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    placed = staging.to(torch_device, non_blocking=on_cuda)
    return [
        placed[start : start + array.nbytes].view(_dtype_of(array)).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


def to_device(rows: Sequence[Sequence[int]], torch_device: torch.device) -> tuple[Tensor, ...]:
    """Rows of integers as int64 tensors on a device, in one copy."""
    on_cuda = torch_device.type == "cuda"
    flat = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64, device="cpu", pin_memory=on_cuda)
    return torch.split(flat.to(torch_device, non_blocking=on_cuda), [len(row) for row in rows])


def _dtype_of(array: npt.NDArray[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype
