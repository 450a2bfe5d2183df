"""How `edgedraft-bench` prints the rows of a measurement."""

from io import StringIO

from rich.console import Console

from bench.setup.results import Results, Row


def printed(rows: list[Row], width: int) -> str:
    output = StringIO()
    Results({}, rows, {}).show(Console(file=output, width=width))
    return output.getvalue()


def test_rows_that_fit_are_one_table() -> None:
    lines = printed([{"case": "a", "tokens_per_second": 31.25}, {"case": "b", "tokens_per_second": 7.5}], 80)
    assert lines.count("case") == 1
    assert "31.2" in lines
    assert "7.5" in lines


def test_no_figure_is_cut_where_a_table_is_too_wide() -> None:
    row: Row = {"case": "ahead", **{f"figure_{index}": "1.41 (1.33 to 1.60)" for index in range(16)}}
    lines = printed([row, {**row, "case": "one at a time"}], 60)
    assert "…" not in lines
    assert lines.count("1.41 (1.33 to 1.60)") == 32
