"""Errors of other libraries in one line."""

import re

from common.error_text import first_line
from tests.sample import PROJECT


def test_an_error_is_one_line_also_where_it_says_nothing() -> None:
    assert first_line(ValueError("first\nsecond")) == "first"
    assert first_line(RuntimeError("\n  first\nsecond")) == "first"
    assert first_line(MemoryError()) == "MemoryError"


def test_no_other_place_takes_the_first_line_of_an_error() -> None:
    """An error without a text has none, so that ``splitlines()[0]`` fails."""
    own = PROJECT / "common" / "error_text.py"
    packages = ("protocol", "common", "export", "device", "basestation", "bench")
    files = {path for package in packages for path in (PROJECT / package).rglob("*.py")} - {own}
    pattern = re.compile(r"str\(error\)(\.strip\(\))?\.splitlines")
    assert [path for path in files if pattern.search(path.read_text(encoding="utf-8"))] == []
