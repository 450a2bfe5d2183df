"""The documentation says what is there."""

import re

from protocol.rounds import diagram
from tests.sample import PROJECT


def test_the_state_diagram_is_the_transition_table() -> None:
    assert diagram() in (PROJECT / "docs" / "protocol.md").read_text(encoding="utf-8")


def test_every_module_stands_in_the_readmes_tree() -> None:
    tree = (PROJECT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("## Limits")[0]
    named = set(re.findall(r"(\w+)\.py", tree))
    for room in ("protocol", "device", "basestation", "export", "bench"):
        modules = {path.stem for path in (PROJECT / room).glob("*.py") if not path.stem.startswith("__")}
        assert modules - {"cli"} - named == set(), room
