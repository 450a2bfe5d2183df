"""The ceiling, measured on a tiny target, and its section of the report."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from basestation.kv_cache.memory import parameter_count
from bench.report.report import write_report
from bench.setup.results import Results, Row
from bench.station import ceiling, passes
from bench.station.ceiling import CASES, SHAPES, Ceiling, combinations, compare
from bench.station.passes import ContinuousBatchingError, DensePassRunner, continuous_batching_seconds
from protocol.errors import SettingsError
from tests.tiny_target import CPU

NEEDS_GPU = "transformers sizes the pages of continuous batching by a GPU's memory"
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def measure(contexts: list[int], sessions: list[int]) -> list[Row]:
    tiny = Ceiling(TINY, torch.float32, CPU)
    rows = [row for one in combinations(contexts, sessions, 5) for row in tiny.rows(one, lambda: None)]
    return [*rows, *compare(rows)]


def test_every_combination_has_its_cases_and_their_ratios() -> None:
    *rows, one, two = measure([20], [1, 3])
    assert [(row["case"], row["sessions"]) for row in rows] == [(case, count) for count in (1, 3) for case in CASES]
    for row, tokens in zip(rows, (6, 6, 1, 1, 18, 18, 3, 3), strict=True):
        if row["case"] == "continuous":
            assert (row["milliseconds"], row["skipped"]) == (None, NEEDS_GPU)
            continue
        assert isinstance(row["milliseconds"], float)
        assert row["tokens_per_second"] == pytest.approx(tokens / row["milliseconds"] * 1e3)
        assert row["skipped"] is None
    for compared, (packed, dense, *_) in ((one, rows[:4]), (two, rows[4:])):
        assert isinstance(packed["tokens_per_second"], float)
        assert isinstance(dense["tokens_per_second"], float)
        assert compared["share_of_ceiling"] == packed["tokens_per_second"] / dense["tokens_per_second"]


@pytest.mark.parametrize(
    ("dense", "continuous", "share"), [(100.0, 40.0, 0.5), (40.0, 200.0, 0.25), (None, 50.0, 1.0), (None, None, None)]
)
def test_the_ceiling_is_the_better_rival(dense: float | None, continuous: float | None, share: float | None) -> None:
    speeds = {"packed": 50.0, "dense": dense, "continuous": continuous, "target": 25.0}
    rows: list[Row] = [
        {"case": case, "context": 512, "sessions": 64, "tokens_per_second": speed} for case, speed in speeds.items()
    ]
    (compared,) = compare(rows)
    assert (compared["share_of_ceiling"], compared["max_gain_over_target"]) == (share, 2.0)


def test_continuous_batching_is_timed_while_all_sequences_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "transformers.generation.continuous_batching.cache"
    monkeypatch.setattr(f"{module}.get_device_and_memory_breakdown", lambda: (CPU, 2**34, 0, 0))
    monkeypatch.setattr(passes, "PREFILL_TOKENS", 64)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY), attn_implementation="sdpa_paged")
    sequences = torch.randint(97, (5, 30), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(continuous_batching_seconds(model, sequences, 4)) >= 4
    monkeypatch.setattr(f"{module}.get_device_and_memory_breakdown", lambda: (CPU, 1, 0, 0))
    with pytest.raises(ContinuousBatchingError, match="continuous batching stopped; the log says why"):
        continuous_batching_seconds(model, sequences, 4)


def test_dense_passes_are_repeated_with_the_same_result() -> None:
    """The new tokens overwrite those of the last run in the static cache."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY), attn_implementation="sdpa").eval()
    sequences = torch.randint(97, (3, 26), generator=torch.Generator().manual_seed(0)).tolist()
    found: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, __, output: found.append(output.logits[:, -6:]))
    runner = DensePassRunner(model, sequences, 6)
    for _ in range(2):
        runner.run()
    with torch.inference_mode():
        model(torch.tensor(sequences), use_cache=False)
    assert len(found) > 2
    for logits in found[-3:-1]:
        assert torch.allclose(logits, found[-1], atol=1e-5)


def test_a_case_that_does_not_fit_into_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    # weights 87 kB, tensors of a pass 2.4 MB and 4.7 kB a session, 256 B a position and session
    monkeypatch.setattr(ceiling, "free_memory", lambda _: 4 * 2**20)
    rows = measure([20], [1, 200])
    assert [row["skipped"] is None for row in rows[:8]] == [True, True, False, True] + [False] * 4
    assert [row["milliseconds"] for row in rows[4:8]] == [None] * 4
    assert rows[4]["skipped"] == "needs 9.5 MiB, 4.0 MiB are free"
    assert rows[9]["share_of_ceiling"] is None


def test_running_out_of_memory_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(ceiling, "DensePassRunner", fail)
    packed, dense, _, target, compared = measure([20], [2])
    assert (dense["milliseconds"], dense["skipped"]) == (None, "CUDA out of memory. Tried to allocate 2 GiB")
    assert None not in (packed["milliseconds"], target["milliseconds"])
    assert compared["share_of_ceiling"] is None


def test_shapes_have_the_parameter_counts_in_their_names() -> None:
    for name, billions in (("7b", 7.24), ("135m", 0.1345)):
        config = vars(Ceiling(SHAPES[name], torch.bfloat16, CPU))["_config"]
        assert parameter_count(config) / 1e9 == pytest.approx(billions, rel=0.01)


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(SettingsError, match="sessions is 0; allowed: 1 or more"):
        combinations([512], [4, 0], 5)


def test_the_report_names_the_gpu_or_says_that_none_was_available(tmp_path: Path) -> None:
    assert "Not measured: it needs a CUDA device, and none was available." in write_report(
        tmp_path, tmp_path
    ).read_text(encoding="utf-8")
    rows = measure([20], [64])
    Results({"card": "NVIDIA H100", "shape": "7b"}, rows).write(tmp_path / "ceiling.json")
    text = write_report(tmp_path, tmp_path).read_text(encoding="utf-8")
    assert "Settings: card NVIDIA H100, shape 7b." in text
    reached = rows[-1]["share_of_ceiling"]
    assert f"that a packed pass of 64 sessions reaches: {reached:.2f} at context length 20" in text
    assert "needs a CUDA device" not in text
