"""One attention call per layer agrees with one per sequence; on a GPU with its kernel, elsewhere with a plain one."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode

from basestation.kv_cache.kv_pages import KVPages, KVShape
from basestation.target import varlen_attention
from basestation.target.attention import SequentialBatch
from basestation.target.forward_pass import ForwardPass
from basestation.target.host_transfer import to_device
from basestation.target.segment import Segment
from basestation.target.varlen_attention import VarlenBatch, batch_type, failure_of_trial, missing_for_varlen
from tests.tiny_target import DTYPE, ON_CUDA, WINDOW, ids, tiny_pair

Kernel: TypeAlias = Callable[..., Tensor]
HEADS, KV_HEADS, HEAD_SIZE, LAYERS, PAGES = 6, 2, 16, 2, 12
CUDA_SHAPE = KVShape(2, 2, 64, torch.bfloat16, torch.device("cuda"))


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, **rest: Any
) -> Tensor:
    """What PyTorch documents of ``varlen_attn``, sequence by sequence."""
    assert rest["enable_gqa"]
    assert rest["num_splits"] == 1
    lengths, table = rest["seqused_k"].tolist(), rest["block_table"]
    assert table.dtype is rest["seqused_k"].dtype is cu_seq_q.dtype is torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), max(lengths))
    assert cu_seq_k.diff().tolist() == lengths
    left, right = rest["window_size"]
    assert right == 0
    output, group = torch.empty_like(query), query.shape[1] // key.shape[2]
    for index, length in enumerate(lengths):
        keys, values = (
            one[table[index].long()].flatten(0, 1)[:length].repeat_interleave(group, 1) for one in (key, value)
        )
        first, last = cu_seq_q[index : index + 2].tolist()
        positions = torch.arange(length - (last - first), length, device=query.device)[:, None]
        columns = torch.arange(length, device=query.device)
        unseen = (columns > positions) | (columns < positions - (length if left < 0 else left))
        scores = torch.einsum("rhd,khd->hrk", query[first:last], keys) * rest["scale"]
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        output[first:last] = torch.einsum("hrk,khd->rhd", weights, values)
    return output


def filled_pages() -> KVPages:
    shape = KVShape(LAYERS, KV_HEADS, HEAD_SIZE, DTYPE, torch.get_default_device())
    kv_pages = KVPages(shape, PAGES)
    for one in (*kv_pages.keys, *kv_pages.values):
        one.copy_(torch.randn(one.shape, dtype=DTYPE))
    return kv_pages


@pytest.mark.parametrize("window", [None, 1, 7, 300])
def test_one_call_for_all_sequences_agrees_with_one_per_sequence(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ON_CUDA:
        monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    torch.manual_seed(0)
    one, other = filled_pages(), filled_pages()
    for mine, others in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
        others.copy_(mine)
    size = one.shape.page_size
    forward_pass = ForwardPass(starts=[0, size + 3, 2 * size - 2, 5], counts=[4, 1, 6, 3])
    forward_pass.page_tables.extend([[4, 9], [7, 2], [0, 11, 3], [5]])
    used = sum(forward_pass.counts)
    batches = (
        kind(forward_pass, kv_pages, to_device(kind.layout(forward_pass, size), one.shape.torch_device))
        for kind, kv_pages in ((SequentialBatch, one), (VarlenBatch, other))
    )
    sequential, varlen_batch = batches
    for layer in range(LAYERS):
        query, key, value = (torch.randn(heads, used + 2, HEAD_SIZE, dtype=DTYPE) for heads in (HEADS, KV_HEADS, 2))
        expected, found = (
            batch.attend(layer, query, key, value, HEAD_SIZE**-0.5, window) for batch in (sequential, varlen_batch)
        )
        assert torch.allclose(found, expected, atol=2e-2 if ON_CUDA else 1e-5)
        assert found[:, used:].count_nonzero() == 0
        assert torch.equal(one.keys[layer], other.keys[layer])
        assert torch.equal(one.values[layer], other.values[layer])


@pytest.mark.parametrize(
    ("shape", "capability", "reason"),
    [
        (CUDA_SHAPE, (9, 0), None),
        (KVShape(2, 2, 64, torch.float32, torch.device("cuda")), (9, 0), "KV cache is of torch.float32"),
        (KVShape(2, 2, 320, torch.float16, torch.device("cuda")), (9, 0), "heads have 320 numbers"),
        (KVShape(2, 2, 36, torch.float16, torch.device("cuda")), (9, 0), "heads have 36 numbers"),
        (CUDA_SHAPE, (7, 5), "compute capability 7.5"),
    ],
)
def test_a_line_says_what_one_call_per_layer_lacks(
    shape: KVShape,
    capability: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(varlen_attention, "failure_of_trial", lambda _: None)
    if reason is None:
        assert batch_type(shape, independent_rows=False) is VarlenBatch
        return
    assert batch_type(shape, independent_rows=False) is SequentialBatch
    assert "attention: one call per sequence and layer, because" in caplog.text
    assert reason in caplog.text


def test_a_kernel_that_fails_or_differs_in_a_trial_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = KVShape(3, KV_HEADS, HEAD_SIZE, torch.float32, torch.device("cpu"))
    assert str(failure_of_trial(shape)).startswith("a trial failed: ")
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    assert failure_of_trial(shape) is None
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, *_, **__: query.new_full(query.shape, torch.nan))
    assert str(failure_of_trial(shape)) == "its result in a trial with window None differed by nan"


def no_window(varlen_attn: Kernel, *args: Any, **rest: Any) -> Tensor:
    return varlen_attn(*args, **{**rest, "window_size": (-1, 0)})


def a_longer_window(varlen_attn: Kernel, *args: Any, **rest: Any) -> Tensor:
    left, right = rest["window_size"]
    return varlen_attn(*args, **{**rest, "window_size": (left if left < 0 else left + 1, right)})


def pages_in_order(varlen_attn: Kernel, *args: Any, **rest: Any) -> Tensor:
    return varlen_attn(*args, **{**rest, "block_table": rest["block_table"].sort().values})


def new_positions_alone(varlen_attn: Kernel, *args: Any, **rest: Any) -> Tensor:
    query, key, value, cu_seq_q, *_ = args
    new = cu_seq_q.diff()
    return varlen_attn(
        query, key, value, cu_seq_q, cu_seq_q, int(new.max()), int(new.max()), **{**rest, "seqused_k": new}
    )


@pytest.mark.parametrize("defect", [no_window, a_longer_window, pages_in_order, new_positions_alone])
def test_the_trial_sees_what_a_kernel_ignores(defect: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(varlen, "varlen_attn", partial(defect, plain_varlen))
    shape = KVShape(3, KV_HEADS, HEAD_SIZE, torch.float32, torch.device("cpu"))
    assert str(failure_of_trial(shape)).startswith("its result in a trial with window ")


class Transfers(TorchFunctionMode):
    """Counts the tensors that are made of numbers of the host."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.tensor, torch.as_tensor, torch.from_numpy)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [SequentialBatch, VarlenBatch])
def test_a_pass_gets_all_its_numbers_in_one_transfer(
    kind: type[SequentialBatch] | type[VarlenBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    with torch.device("cpu"):
        plain, target = tiny_pair("mistral", sliding_window=WINDOW)
        monkeypatch.setattr(vars(target)["_runner"], "_batch_type", kind)
        texts = [ids(200, 1), ids(20, 2)]
        kv_caches = [target.new_kv_cache() for _ in texts]
        target.forward([Segment(kv_cache, text[:-5], 0) for kv_cache, text in zip(kv_caches, texts, strict=True)])
        segments = [Segment(kv_cache, text[-5:], 5) for kv_cache, text in zip(kv_caches, texts, strict=True)]
        with Transfers() as transfers:
            logits = torch.split(target.forward(segments), 5)
        assert transfers.count == 1
        for text, rows in zip(texts, logits, strict=True):
            with torch.inference_mode():
                expected = plain(torch.tensor([text]), use_cache=False).logits[0, -5:]
            assert torch.allclose(rows, expected, atol=2e-4, rtol=1e-4)


def test_an_older_pytorch_without_page_tables_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, window_size, enable_gqa: None)
    missing = missing_for_varlen(CUDA_SHAPE)
    assert missing is not None
    assert missing.endswith("has no block_table, num_splits, seqused_k")


def test_the_kernels_read_pages_that_are_contiguous() -> None:
    shape = KVShape(1, 2, 8, torch.float16, torch.device("meta"))
    keys, values = KVPages(shape, 3).tables(0)
    assert keys.shape == values.shape == (3, shape.page_size, 2, 8)
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert CUDA_SHAPE.page_size % 256 == 0
