"""``edgedraft-bench``: the measurements behind every figure of the documentation."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from common.command_line import application, run

MODULES = {
    "demo": "bench.demo",
    "speedup": "bench.grid.speedup",
    "grid": "bench.grid.run",
    "ahead": "bench.grid.ahead",
    "fresh": "bench.grid.fresh",
    "categories": "bench.pair.categories",
    "lookup": "bench.pair.lookup",
    "verification": "bench.pair.verification",
    "agreement": "bench.pair.agreement",
    "peers": "bench.pair.peers",
    "exact": "bench.exact",
    "uplink": "bench.uplink.modes",
    "encodings": "bench.uplink.encodings",
    "choices": "bench.uplink.choices",
    "overheads": "bench.uplink.overheads",
    "draft": "bench.draft.draft",
    "theory": "bench.theory",
    "relay": "bench.link.relay",
    "link": "bench.link.accuracy",
    "capacity": "bench.station.capacity",
    "cluster": "bench.station.cluster",
    "churn": "bench.station.churn",
    "prefixes": "bench.station.prefixes",
    "ceiling": "bench.station.ceiling",
    "masks": "bench.station.masks",
    "weights": "bench.station.weights",
    "report": "bench.report.report",
}
"""Each command and the module with the function of that name."""


class LazyGroup(TyperGroup):
    """Imports a command's module when the command is used: torch and its like take seconds to load.

    The list of commands takes its texts from the sources, without importing them.
    """

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name) for name in MODULES}
        self._is_listing = False

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, or in the list of commands one that has only its summary."""
        if self._is_listing or cmd_name not in MODULES:
            return super().get_command(ctx, cmd_name)
        return _load(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the group."""
        self._begin_listing()
        super().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The names of the commands, with their summaries."""
        self._begin_listing()
        return super().shell_complete(ctx, incomplete)

    def _begin_listing(self) -> None:
        for name, command in self.commands.items():
            command.help = summary(name)
        self._is_listing = True


app = application("Measure edgedraft against its alternatives.", LazyGroup)


def summary(name: str) -> str:
    """The first line of a command's docstring, read from its source."""
    spec = find_spec(MODULES[name])
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return (ast.get_docstring(function) or "").partition("\n")[0]


def main() -> None:
    """Run the command line."""
    run(app, "bench")


def _load(name: str) -> Any:
    single = typer.Typer(add_completion=False)
    single.command(name)(getattr(import_module(MODULES[name]), name))
    return typer.main.get_command(single)
