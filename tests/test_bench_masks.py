"""The time of masks, measured with a tokenizer of bytes."""

from bench.setup.results import number
from bench.station.masks import GRAMMARS, measure_masks
from tests.hostile_grammars import STOP, VOCAB, tokenizer_json


def test_each_grammar_has_a_row_with_times() -> None:
    rows = measure_masks(tokenizer_json(), VOCAB, STOP, rows=20, longest=8)
    assert [row["case"] for row in rows] == [*GRAMMARS]
    for row in rows:
        times = [number(row, f"mask_{name}_microseconds") for name in ("p50", "p99", "longest")]
        assert 0 < times[0] <= times[1] <= times[2]
        assert number(row, "again_p99_microseconds") > 0
        assert number(row, "compile_milliseconds") > 0
        assert number(row, "mebibytes_at_most") >= 1
