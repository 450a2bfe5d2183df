"""What a pass takes from the host reaches the device in one copy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from basestation.target import host_transfer
from basestation.target.host_transfer import HostTransfer, in_one_copy
from basestation.verification.verify import RoundToVerify, verify_rounds
from protocol.full_distribution import FullDistribution
from protocol.messages import DraftDistribution, Sampling
from protocol.sparse import SparseDistribution
from tests.tiny_target import CPU

VOCAB = 700
HOST_NUMBERS = (torch.tensor, torch.as_tensor, torch.from_numpy)


class Copies(TorchFunctionMode):
    """Counts copies of a ``HostTransfer``, and numbers of the host that reach tensors beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []
        self.beside: list[str] = []
        self._inside = False

    @contextmanager
    def one(self, arrays: int) -> Iterator[None]:
        self.made.append(arrays)
        self._inside = True
        yield
        self._inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexing = func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], (list, np.ndarray))
        if not self._inside and (func in HOST_NUMBERS or indexing):
            self.beside.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    """Copies as a GPU needs them."""
    counted = Copies()

    def placed(arrays: Sequence[npt.NDArray[Any]]) -> list[Tensor]:
        with counted.one(len(arrays)):
            return in_one_copy(arrays, CPU)

    monkeypatch.setattr(host_transfer, "shared", placed)
    return counted


def rounds_of_all_kinds() -> list[RoundToVerify]:
    rng = np.random.default_rng(0)
    sparse = SparseDistribution(VOCAB, np.array([2, 5, 300]), np.array([3, 4, 1]), 8)
    full = FullDistribution.quantize(rng.dirichlet(np.ones(VOCAB)))
    by_match = [
        RoundToVerify(sampling, 9, (5, 2))
        for sampling in (Sampling(), Sampling(0.7, seed=2), Sampling(1.2, top_k=9, seed=3), Sampling(0.9, seed=4))
    ]
    sent: list[DraftDistribution] = [sparse, full, sparse, full]
    by_rejection = [
        RoundToVerify(Sampling(0.8, top_p=top_p, seed=5), 9, (5, 2), (one, one), True)
        for one, top_p in zip(sent, (1.0, 1.0, 0.9, 0.9), strict=True)
    ]
    blocks = [replace(one, block_verification=True) for one in by_rejection]
    return [one for kinds in zip(by_match, by_rejection, blocks, strict=True) for one in kinds]


def logits_of(rounds: Sequence[RoundToVerify]) -> Tensor:
    """Of which half of the rounds' drafted tokens are likely."""
    rows = sum(one.num_logits for one in rounds)
    with CPU:
        logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0))
        logits[::6, 5] += 20
        logits[1::6, 2] += 20
        return logits


def test_arrays_of_all_types_and_shapes_arrive_in_one_buffer() -> None:
    words = np.arange(12, dtype=np.int64)
    arrays: list[npt.NDArray[Any]] = [
        np.array([True, False, True]),
        words.reshape(2, 6),
        np.array([0.5], np.float16),
        np.empty(0, np.int64),
        words[::5],
        np.array([1e-300, 2.0]),
        np.array([3.0], np.float32),
    ]
    placed = in_one_copy(arrays, CPU)
    assert len({one.untyped_storage().data_ptr() for one in placed}) == 1
    for array, tensor in zip(arrays, placed, strict=True):
        expected = torch.from_numpy(array.copy())
        assert tensor.dtype is expected.dtype
        assert torch.equal(tensor, expected)


def test_the_first_use_sends_all_arrays_and_none_can_follow() -> None:
    transfer = HostTransfer(CPU)
    one, other = transfer.add(np.arange(3)), transfer.add(np.ones(2))
    assert transfer.copies == 0
    assert (one.tensor.tolist(), other.tensor.tolist()) == ([0, 1, 2], [1.0, 1.0])
    assert transfer.copies == 1
    with pytest.raises(AssertionError, match="before the first of them is used"):
        transfer.add(np.arange(3))


def test_verification_of_all_kinds_of_rounds_takes_one_copy(copies: Copies) -> None:
    rounds = rounds_of_all_kinds()
    with CPU, copies:
        verify_rounds(logits_of(rounds), rounds)
    assert len(copies.made) == 1
    assert copies.beside == []


@pytest.mark.usefixtures("copies")
def test_rounds_verified_together_have_the_results_of_each_alone() -> None:
    rounds = rounds_of_all_kinds()
    logits, start, alone = logits_of(rounds), 0, []
    with CPU:
        for one in rounds:
            alone += verify_rounds(logits[start : start + one.num_logits].clone(), [one])
            start += one.num_logits
        assert verify_rounds(logits, rounds) == alone
    assert len({one.accepted for one in alone}) > 1
