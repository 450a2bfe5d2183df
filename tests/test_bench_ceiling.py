"""The ceiling, on a target that is small enough for any machine, and what the report says of it."""

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


def test_every_combination_has_its_three_cases_and_their_ratios() -> None:
    *rows, one, two = measure([20], [1, 3])
    assert [(row["case"], row["sessions"]) for row in rows] == [
        (case, count) for count in (1, 3) for case in ("packed", "dense", "target")
    ]
    for row, tokens in zip(rows, (6, 6, 1, 18, 18, 3), strict=True):
        assert isinstance(row["milliseconds"], float)
        assert row["tokens_per_second"] == pytest.approx(tokens / row["milliseconds"] * 1e3)
        assert row["left_out"] is None
    for compared, (packed, dense, _) in ((one, rows[:3]), (two, rows[3:])):
        assert isinstance(packed["milliseconds"], float)
        assert isinstance(dense["milliseconds"], float)
        assert compared["of_the_ceiling"] == dense["milliseconds"] / packed["milliseconds"]


def test_what_does_not_fit_is_said_with_the_sizes_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    # weights 87 kB, tensors of a pass 2.4 MB and 4.7 kB a session, 256 B a position and session
    monkeypatch.setattr(ceiling, "free_memory", lambda _: 4 * 2**20)
    rows = measure([20], [1, 200])
    assert [row["left_out"] is None for row in rows[:6]] == [True] * 3 + [False] * 3
    assert [row["milliseconds"] for row in rows[3:6]] == [None] * 3
    assert rows[3]["left_out"] == "takes 9.5 MiB, 4.0 MiB are free"
    assert rows[7]["of_the_ceiling"] is None


def test_memory_that_is_short_after_all_is_a_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(ceiling, "DensePass", fail)
    packed, dense, target, compared = measure([20], [2])
    assert (dense["milliseconds"], dense["left_out"]) == (None, "CUDA out of memory. Tried to allocate 2 GiB")
    assert None not in (packed["milliseconds"], target["milliseconds"])
    assert compared["of_the_ceiling"] is None


def test_the_shapes_are_of_the_sizes_that_name_them() -> None:
    for name, billions in (("7b", 7.24), ("135m", 0.1345)):
        config = vars(Ceiling(SHAPES[name], torch.bfloat16, CPU))["_config"]
        assert parameter_count(config) / 1e9 == pytest.approx(billions, rel=0.01)


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(SettingsError, match="sessions is 0; allowed: 1 and more"):
        combinations([512], [4, 0], 5)


def test_the_report_names_the_card_or_says_that_none_was_at_hand(tmp_path: Path) -> None:
    assert "Not measured: it takes a CUDA device, and none was at hand." in write_report(tmp_path, tmp_path).read_text(
        encoding="utf-8"
    )
    rows = measure([20], [64])
    Results({"card": "NVIDIA H100", "shape": "7b"}, rows).write(tmp_path / "ceiling.json")
    text = write_report(tmp_path, tmp_path).read_text(encoding="utf-8")
    assert "With: card NVIDIA H100, shape 7b." in text
    reached = rows[-1]["of_the_ceiling"]
    assert f"At 64 sessions a packed pass reaches, of the ceiling: {reached:.2f} at contexts of 20" in text
    assert "no CUDA device" not in text
