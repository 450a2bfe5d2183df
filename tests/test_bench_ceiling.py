"""The ceiling, measured on a tiny target, and its section of the report."""

from pathlib import Path

import pytest
import torch

from basestation.memory import parameter_count
from bench.report.report import write_report
from bench.setup.results import Results, Row
from bench.station import ceiling
from bench.station.ceiling import SHAPES, Ceiling, combinations, compare
from protocol.errors import SettingsError

CPU = torch.device("cpu")
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


def test_every_combination_has_three_cases_and_their_ratios() -> None:
    *rows, one, two = measure([20], [1, 3])
    assert [(row["case"], row["sessions"]) for row in rows] == [
        (case, count) for count in (1, 3) for case in ("packed", "dense", "target")
    ]
    for row, tokens in zip(rows, (6, 6, 1, 18, 18, 3), strict=True):
        assert isinstance(row["milliseconds"], float)
        assert row["tokens_per_second"] == pytest.approx(tokens / row["milliseconds"] * 1e3)
        assert row["skipped"] is None
    for compared, (packed, dense, _) in ((one, rows[:3]), (two, rows[3:])):
        assert isinstance(packed["milliseconds"], float)
        assert isinstance(dense["milliseconds"], float)
        assert compared["share_of_ceiling"] == dense["milliseconds"] / packed["milliseconds"]


def test_a_case_that_does_not_fit_into_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    # weights 87 kB, tensors of a pass 2.4 MB and 4.7 kB a session, 256 B a position and session
    monkeypatch.setattr(ceiling, "free_memory", lambda _: 4 * 2**20)
    rows = measure([20], [1, 200])
    assert [row["skipped"] is None for row in rows[:6]] == [True] * 3 + [False] * 3
    assert [row["milliseconds"] for row in rows[3:6]] == [None] * 3
    assert rows[3]["skipped"] == "needs 9.5 MiB, 4.0 MiB are free"
    assert rows[7]["share_of_ceiling"] is None


def test_running_out_of_memory_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(ceiling, "DensePassRunner", fail)
    packed, dense, target, compared = measure([20], [2])
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
