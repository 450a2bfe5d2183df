"""Passes as CUDA graphs: padding, the spare page, and what is kept; without a GPU a graph is a function that reruns."""

from collections.abc import Callable
from functools import partial
from itertools import cycle, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode

from basestation.target import model_runner, pass_graphs
from basestation.target.forward_pass import ForwardPass
from basestation.target.model_runner import ModelRunner
from basestation.target.pass_graphs import BUCKETS
from basestation.target.segment import Segment
from basestation.target.target_model import TargetModel
from basestation.target.varlen_attention import VarlenBatch
from tests.test_basestation_varlen_attention import plain_varlen
from tests.tiny_target import DTYPE, ON_CUDA, WINDOW, ids, tiny_pair

KV_MEMORY = 2**22


def bounded_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, **rest: Any
) -> Tensor:
    """``plain_varlen`` with bounds that some sequence need not reach."""
    most, longest = int(cu_seq_q.diff().max()), int(rest["seqused_k"].max())
    assert most <= max_q
    assert longest <= max_k
    return plain_varlen(query, key, value, cu_seq_q, cu_seq_k, most, longest, **rest)


def rerun(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    logits = run()
    return logits, lambda: logits.copy_(run())


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of a pass without graph and with it; a list to change."""
    times = [2.0, 1.0]
    turns = cycle((0, 1))
    monkeypatch.setattr(pass_graphs, "_seconds", lambda *_: times[next(turns)])
    if not ON_CUDA:
        monkeypatch.setattr(varlen, "varlen_attn", bounded_varlen)
        monkeypatch.setattr(model_runner, "batch_type", lambda *_: VarlenBatch)
        monkeypatch.setattr(model_runner, "CudaCapture", lambda _: rerun)
        monkeypatch.setattr(pass_graphs, "_TOLERANCE", 1000)  # a row's float32 result depends on the number of rows
    return times


def targets(window: int = 512, dtype: torch.dtype = DTYPE) -> tuple[TargetModel, TargetModel]:
    """A target that tries graphs, and the same without."""
    _, plain = tiny_pair("mistral", sliding_window=window)
    model = vars(runner_of(plain))["_model"].to(dtype)
    captured, eager = (
        TargetModel(model, plain.vocabulary, "tiny", KV_MEMORY, cuda_graphs=graphs) for graphs in (True, False)
    )
    return captured, eager


def runner_of(target: TargetModel) -> ModelRunner:
    runner = vars(target)["_runner"]
    assert isinstance(runner, ModelRunner)
    return runner


def graphs_of(target: TargetModel) -> dict[int, Any]:
    graphs = vars(runner_of(target))["_graphs"]
    return {} if graphs is None else dict(vars(graphs)["_graphs"])


def run_passes(target: TargetModel) -> list[Tensor]:
    """Prompts in chunks, rounds, rollbacks, and sequences that come and go: passes of 3 to 600 rows."""
    texts = [ids(400, 1), ids(140, 2), ids(9, 3), ids(300, 4)]
    one, two, three, four = (target.new_kv_cache() for _ in texts)
    passes = [
        [Segment(one, texts[0][:300], 1)],
        [Segment(two, texts[1][:130], 0), Segment(one, texts[0][300:306], 6)],
        [Segment(three, texts[2][:2], 2), Segment(two, texts[1][130:131], 1)],
        [Segment(one, texts[0][303:311], 8), Segment(three, texts[2][2:], 7), Segment(two, texts[1][131:], 9)],
        [Segment(two, texts[1][:64], 64)],
        [Segment(one, texts[0][311:], 3)],
        [Segment(two, texts[3], 1), Segment(four, texts[3], 2)],
    ]
    logits = []
    for index, segments in enumerate(passes):
        if index == 3:
            one.rollback(303)
        if index in (4, 6):
            two.release()
        logits.append(target.forward(segments).clone())
    return logits


def noting(runs: list[int], rows: int, run: Callable[[ForwardPass], Tensor], forward_pass: ForwardPass) -> Tensor:
    runs.append(rows)
    return run(forward_pass)


@pytest.mark.parametrize("window", [WINDOW, 512])
def test_padded_passes_give_the_logits_of_unpadded_ones(seconds: list[float], window: int) -> None:
    captured, eager = targets(window)
    assert set(graphs_of(captured)) == set(BUCKETS)
    runs: list[int] = []
    for rows, graph in graphs_of(captured).items():
        graph.run = partial(noting, runs, rows, graph.run)
    for found, expected in zip(run_passes(captured), run_passes(eager), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=float(expected.abs().max()) * (0.05 if ON_CUDA else 1e-5))
    assert runs == [320, 192, 8, 24, 64, 96]  # the last has too many rows
    assert captured.kv_pool.used == eager.kv_pool.used


def test_the_spare_page_is_part_of_the_kv_memory_and_no_sequences(seconds: list[float]) -> None:
    captured, eager = targets()
    page_size = eager.kv_pool.page_size
    assert captured.kv_bytes == eager.kv_bytes <= KV_MEMORY
    assert captured.kv_pool.capacity == eager.kv_pool.capacity - page_size
    pages = eager.kv_pool.capacity // page_size
    assert captured.kv_pool.take(pages - 1, None) == [*range(pages - 1)]
    seconds[1] = 3.0
    assert targets()[0].kv_pool.capacity == eager.kv_pool.capacity


def test_padding_rows_write_to_the_spare_page_alone(seconds: list[float]) -> None:
    captured, _ = targets()
    kv_pages = vars(runner_of(captured))["_kv_pages"]
    page_size = captured.kv_pool.page_size
    kv_pages.clear(range(kv_pages.count * page_size))
    kv_cache = captured.new_kv_cache()
    captured.forward([Segment(kv_cache, ids(33, 1), 1)])
    written = {int(position) for one in kv_pages.keys for position in one.abs().sum(dim=(0, 2)).nonzero()}
    first, spare = kv_cache.pages[0] * page_size, (kv_pages.count - 1) * page_size
    assert written == {*range(first, first + 33), *range(spare, spare + 15)}


class IntegerCopies(TorchFunctionMode):
    """Counts how often integers of the host are copied or made a tensor."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copied = func is Tensor.copy_ and args[1].dtype is torch.int64
        self.count += copied or func in (torch.tensor, torch.as_tensor, torch.from_numpy)
        return func(*args, **(kwargs or {}))


def test_a_captured_pass_gets_all_its_numbers_in_one_copy(seconds: list[float]) -> None:
    captured, _ = targets()
    segments = [Segment(captured.new_kv_cache(), ids(length, length), 1) for length in (3, 9, 1)]
    with IntegerCopies() as copies:
        captured.forward(segments)
    assert copies.count == 1


def test_graphs_that_are_not_faster_are_not_kept(seconds: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert graphs_of(targets()[0])
    assert "512 rows are 2.00 to 2.00 times as fast" in caplog.text
    seconds[1] = 2.0
    assert graphs_of(targets()[0]) == {}
    assert "no CUDA graphs: passes are not faster with them" in caplog.text


def test_only_the_numbers_of_rows_that_are_faster_have_graphs(
    seconds: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(pass_graphs.PassGraphs, "_gain", lambda graphs, rows, _: slow_above(graphs, rows, 64))
    captured, _ = targets()
    assert set(graphs_of(captured)) == {rows for rows in BUCKETS if rows <= 64}
    slower = ", ".join(str(rows) for rows in BUCKETS if rows > 64)
    assert f"rows are 1.50 to 1.50 times as fast; not for {slower} rows, which are slower" in caplog.text


def slow_above(graphs: pass_graphs.PassGraphs, rows: int, most: int) -> float:
    vars(graphs)["_graphs"][rows] = object()
    return 0.9 if rows > most else 1.5


def fail(_: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def no_replay(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    return torch.zeros_like(run()), lambda: None


def nan(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    return torch.full_like(run(), torch.nan), lambda: None


@pytest.mark.parametrize(
    ("capture", "line"),
    [
        (fail, "no CUDA graphs: operation not permitted when stream is capturing"),
        (no_replay, "no CUDA graphs: logits of 512 rows differ by"),
        (nan, "no CUDA graphs: logits of 512 rows differ by nan"),
    ],
)
def test_a_line_says_why_there_are_no_graphs_and_passes_run_without(
    capture: pass_graphs.Capture,
    line: str,
    seconds: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(model_runner, "CudaCapture", lambda _: capture)
    captured, eager = targets()
    assert line in caplog.text
    assert captured.kv_pool.capacity == eager.kv_pool.capacity
    assert torch.equal(run_passes(captured)[0], run_passes(eager)[0])


def test_with_one_attention_call_per_sequence_there_are_none() -> None:
    captured, eager = targets(dtype=torch.float32)
    assert graphs_of(captured) == {}
    assert captured.kv_pool.capacity == eager.kv_pool.capacity


def test_a_pool_of_few_pages_has_graphs_for_the_rows_that_it_holds(
    seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, eager = targets()
    page_size = eager.kv_pool.page_size
    monkeypatch.setitem(globals(), "KV_MEMORY", 3 * page_size * KV_MEMORY // eager.kv_pool.capacity)
    captured, eager = targets()
    assert eager.kv_pool.capacity == 3 * page_size
    assert set(graphs_of(captured)) == {rows for rows in BUCKETS if rows < 2 * page_size}


def test_buckets_are_less_than_a_page_apart() -> None:
    assert all(0 < later - one < 128 for one, later in pairwise(BUCKETS))
