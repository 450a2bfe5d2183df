"""A pytest plugin that runs the target's tests on a GPU: ``pytest -p tests.on_cuda``."""

import pytest
import torch


def pytest_configure() -> None:
    """Create tensors and models on CUDA.

    Raises:
        pytest.UsageError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise pytest.UsageError("PyTorch finds no CUDA device; run make test instead, or check nvidia-smi")
    torch.set_default_device("cuda")
