"""From the host to the device of a pass: all integers in one copy, which the pass does not wait for."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor


def to_device(rows: Sequence[Sequence[int]], torch_device: torch.device) -> tuple[Tensor, ...]:
    """Rows of integers as int64 tensors on a device."""
    on_cuda = torch_device.type == "cuda"
    flat = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64, device="cpu", pin_memory=on_cuda)
    return torch.split(flat.to(torch_device, non_blocking=on_cuda), [len(row) for row in rows])
