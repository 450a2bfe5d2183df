"""docs/results.md: losses, failures and missing cells are reported."""

from pathlib import Path
from typing import Any

import pytest
import typer

from bench.cli import app
from bench.grid.cells import Cell
from bench.grid.pair_run import Measured
from bench.pair.category_rows import CategoryCell, category_cases, category_rows
from bench.report.pair_section import PAIR_COMMANDS
from bench.report.report import COMMANDS, write_report
from bench.setup.results import Results
from protocol.errors import SettingsError
from tests.fakes import QUALITY
from tests.grid_rows import CELL, LOOPBACK, rows_of
from tests.sample import PROJECT

RESULTS = PROJECT / "docs" / "results"
ALL_COMMANDS = {**COMMANDS, **PAIR_COMMANDS}


def test_a_report_creates_its_folder_and_needs_a_folder_of_results(tmp_path: Path) -> None:
    docs = tmp_path / "new" / "docs"
    with pytest.raises(SettingsError, match=r"results is '.*nowhere'; allowed: a folder with the JSON files"):
        write_report(tmp_path / "nowhere", docs)
    assert not docs.exists()
    assert write_report(tmp_path, docs).read_text(encoding="utf-8").count("Not measured") == len(COMMANDS)


def test_the_report_names_losses_failures_and_missing_cells(tmp_path: Path) -> None:
    rows = [*rows_of(LOOPBACK), *rows_of(CELL, auto=None), *rows_of(Cell(0.0, 50.0, 1.0), auto=15.0)]
    Results({"tokens": 48}, rows).write(tmp_path / "grid.json")
    text = write_report(tmp_path, tmp_path).read_text(encoding="utf-8")
    assert "failed: the base station died" in text
    assert text.count("2.00 (1.00)") == 2  # colocated, in every line
    assert "0.20 (1.00)" in text  # the full vocabulary, which is slower than the target alone
    assert "2 of the 30 cells of the grid were measured" in text
    assert "in 0 of 1 cells; the smallest share is 0.54" in text
    assert "above 2 in 1 of the cells" in text  # that of 50 ms
    assert "| temperature 0, 50 ms, 1 Mbit/s | ids, draft length 4 | -29 % | -50 % | +43 % |" in text
    assert text.count("Not measured.") == len(COMMANDS) - 2  # all but the grid and the ceiling, which says why
    assert (tmp_path / "plots" / "speedup_0.svg").exists()


def test_the_report_in_the_repository_is_that_of_its_result_files(tmp_path: Path) -> None:
    written = write_report(RESULTS, tmp_path)
    assert written.read_text(encoding="utf-8") == (PROJECT / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in ALL_COMMANDS if (RESULTS / f"{name}.json").exists()])
def test_the_named_command_measures_what_the_file_says(name: str) -> None:
    _, command, *options = ALL_COMMANDS[name].split()
    settings = Results.read(RESULTS / f"{name}.json").settings
    group: Any = typer.main.get_command(app)
    params = group.get_command(group.make_context("", [command]), command).make_context(command, options).params
    for option in settings.keys() & params.keys() - {"prompts"}:  # of which the file has the number
        is_path = option in ("bundle", "target", "draft", "small_draft")
        given, measured = (Path(str(one)).name if is_path else one for one in (params[option], settings[option]))
        assert given == measured, option
    temperatures = {row["temperature"] for row in Results.read(RESULTS / f"{name}.json").rows if "temperature" in row}
    assert temperatures == set(params.get("temperatures") or temperatures)


def test_a_measured_pair_has_its_sections(tmp_path: Path) -> None:
    Results({}, [*rows_of(LOOPBACK), *rows_of(CELL)]).write(tmp_path / "pair_grid.json")
    measured = Measured({case.name: [] for case in category_cases(0.0)}, {"ids, auto": "refused"})
    rows = category_rows(CategoryCell("coding", 0.0), category_cases(0.0), measured, QUALITY)
    rows = [{**row, "speedup": 1.5, "load_average": 1.0} for row in rows]
    Results({}, rows).write(tmp_path / "categories.json")
    Results({}, [{"case": "llama.cpp, with draft", "missing": "needs node"}]).write(tmp_path / "peers.json")
    others = (
        "lookup",
        "lookup_without_amx",
        "lookup_categories",
        "lookup_others",
        "lookup_math",
        "verification",
        "weights",
    )
    for name in others:
        Results({}, [{"case": f"row of {name}"}]).write(tmp_path / f"{name}.json")
    Results({}, rows).write(tmp_path / "bridge.json")
    text = write_report(tmp_path, tmp_path).read_text(encoding="utf-8")
    assert [name for name in others if f"| row of {name} |" not in text] == []
    assert text.count("### Categories at temperature 0") == 2
    assert "0 of the 16 cells of the grid were measured" in text
    assert "Failed: coding, ids, auto: refused." in text
    assert "| llama.cpp, with draft | needs node |" in text
    assert (tmp_path / "plots" / "pair_speedup_0.svg").exists()
