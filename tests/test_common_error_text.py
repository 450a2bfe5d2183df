"""Errors of other libraries in one line."""

import re

from common.error_text import first_line
from tests.sample import PACKAGES, PROJECT


def test_an_error_is_one_line_also_where_it_says_nothing() -> None:
    assert first_line(ValueError("first\nsecond")) == "first"
    assert first_line(RuntimeError("\n  first\nsecond")) == "first"
    assert first_line(MemoryError()) == "MemoryError"


def test_no_other_place_takes_the_first_line_of_an_error() -> None:
    """An error without a text has none, so that ``splitlines()[0]`` fails."""
    own = PROJECT / "common" / "error_text.py"
    files = {path for package in PACKAGES for path in (PROJECT / package).rglob("*.py")}
    assert own in files
    pattern = re.compile(r"str\(error\)(\.strip\(\))?\.splitlines")
    assert [path for path in files - {own} if pattern.search(path.read_text(encoding="utf-8"))] == []
