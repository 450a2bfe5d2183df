"""The documentation agrees with the repository."""

import re
from importlib.metadata import version

import pytest

from protocol.messages import PROTOCOL_VERSION
from protocol.rounds import diagram
from tests.sample import PACKAGES, PROJECT

FOLDERS = [*PACKAGES, "tests", "docker", "docs"]
PAGES = sorted(str(path.relative_to(PROJECT)) for path in [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")])


def python_files_named_in(text: str) -> set[str]:
    """The words in backticks and code blocks that end in ``.py``."""
    code = [*re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL), *re.findall(r"`[^`\n]+`", text)]
    return {name for part in code for name in re.findall(r"[\w*/.-]+\.py\b", part)}


def test_the_state_diagram_is_the_transition_table() -> None:
    assert diagram() in (PROJECT / "docs" / "protocol.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_the_python_files_that_a_page_names_exist(page: str) -> None:
    files = [path.relative_to(PROJECT) for folder in FOLDERS for path in (PROJECT / folder).rglob("*.py")]
    named = python_files_named_in((PROJECT / page).read_text(encoding="utf-8"))
    assert [name for name in sorted(named) if not any(path.match(name) for path in files)] == []
    assert page not in ("README.md", "CONTRIBUTING.md", "docs/architecture.md") or named


def test_the_changelog_has_the_version_and_every_wire_version() -> None:
    text = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {version('edgedraft')}" in text
    assert re.findall(r"^\| (\d+) \|", text, re.MULTILINE) == [str(n) for n in range(PROTOCOL_VERSION, 0, -1)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_readme_has_a_line_for_each_folder(folder: str) -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^ *{folder}/ +\S", readme, re.MULTILINE)
