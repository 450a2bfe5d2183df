"""No import cycles, no long functions, and only the terms that docs/architecture.md defines."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.sample import PACKAGES, PROJECT

MAX_BODY_LINES = 40
RETIRED_TERMS = {
    "Stretch": r"Stretch\w*|stretch(?:es)?|new_stretch",
    "Arena": r"Arena|arenas?|new_arena|kv_arena",
    "Judgement": r"Judge?ments?|judge?ments?",
    "judge_rounds": r"judge_rounds|JUDGING|judging",
    "Errand": r"[Ee]rrands?",
    "_Desk": r"_Desk",
    "postman": r"[Pp]ostman",
    "made_whole": r"made_whole",
    "Workplace": r"[Ww]orkplaces?",
    "Stage": r"Stage",
    "Player": r"Player",
    "read_along": r"_?read_along",
    "run_ahead": r"run_ahead",
    "leader": r"leader",
    "beginnings": r"[Bb]eginnings?",
    "holders": r"holders",
    "what stands": r"[Ww]hat stands",
    "--patience": r"--patience|[Pp]atience",
    "--keep-seconds": r"--keep-seconds|keep_seconds",
}


def modules_of(package: str) -> dict[str, Path]:
    """Path of each module of a package, by dotted name."""
    paths = sorted((PROJECT / package).rglob("*.py"))
    assert paths
    return {".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that an import can refer to, those under ``TYPE_CHECKING`` and in functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph(modules: dict[str, Path]) -> dict[str, set[str]]:
    """The modules among ``modules`` that each of them imports."""
    return {
        name: {found for found in imported_names(ast.parse(path.read_text(encoding="utf-8"))) if found in modules}
        - {name}
        for name, path in modules.items()
    }


def import_cycle(graph: dict[str, set[str]]) -> str | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return None


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_has_an_import_cycle(package: str) -> None:
    modules = modules_of(package)
    graph = import_graph(modules)
    assert package == "common" or any(graph.values())
    assert import_cycle(graph) is None


def test_an_import_cycle_is_found_and_named(tmp_path: Path) -> None:
    sources = {
        "a.one": "from a import two",
        "a.two": "if TYPE_CHECKING:\n    from a.three import X",
        "a.three": "import a.one",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    graph = import_graph({name: tmp_path / name for name in sources})
    cycle = import_cycle(graph)
    assert cycle is not None
    assert set(cycle.split(" <- ")) == set(sources)
    assert import_cycle({**graph, "a.three": set()}) is None


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions_of(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def is_command(function: Function) -> bool:
    """Whether typer reads the function's signature: as a command or callback, or through annotated options."""
    decorated = any(
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("command", "callback")
        for call in function.decorator_list
    )
    arguments = [*function.args.args, *function.args.kwonlyargs]
    annotations = [ast.unparse(argument.annotation) for argument in arguments if argument.annotation]
    return decorated or any("typer.Option(" in text or "typer.Argument(" in text for text in annotations)


def line_count(function: Function) -> int:
    """Lines of a function; for a command, the lines of its body."""
    assert function.end_lineno is not None
    first = function.body[0].lineno if is_command(function) else function.lineno
    return function.end_lineno - first + 1


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{name}.{function.name}: {line_count(function)} lines"
        for package in [*PACKAGES, "tests"]
        for name, path in modules_of(package).items()
        for function in functions_of(path)
        if line_count(function) > MAX_BODY_LINES
    ]
    assert long == []


def texts() -> Iterator[tuple[str, str]]:
    """Each file that people read, with its text; this file, licences and measured results excepted."""
    patterns = [
        *(f"{package}/**/*.py" for package in PACKAGES),
        "tests/*.py",
        "docs/**/*.md",
        "docker/**/*",
        "*/page/*",
        "*.md",
        "Makefile",
    ]
    paths = {path for pattern in patterns for path in PROJECT.glob(pattern) if path.is_file()}
    for path in sorted(paths - {Path(__file__).resolve()}):
        yield str(path.relative_to(PROJECT)), path.read_text(encoding="utf-8")


@pytest.mark.parametrize("pattern", RETIRED_TERMS.values(), ids=RETIRED_TERMS)
def test_a_retired_term_is_gone(pattern: str) -> None:
    term = re.compile(rf"(?<![\w-])(?:{pattern})(?![\w-])")
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if term.search(line)
    ]
    assert found == []
