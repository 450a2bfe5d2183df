"""``with_options`` makes the fields of a dataclass options of a typer command."""

from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from common.option_groups import with_options


@dataclass(frozen=True)
class LinkOptions:
    server: Annotated[str, typer.Option(help="Endpoint of the base station.")]
    retries: Annotated[int, typer.Option(help="Attempts after the first.", min=0)] = 3
    key_file: Annotated[str | None, typer.Option("--key", metavar="FILE", help="The secret key.")] = None


@dataclass
class Call:
    """The arguments that the command received."""

    options: LinkOptions | None = None
    prompt: str = ""
    count: int = 0


@dataclass
class Program:
    """A command with options of its own and those of ``LinkOptions``."""

    app: typer.Typer = field(default_factory=lambda: typer.Typer(rich_markup_mode=None))
    call: Call = field(default_factory=Call)

    def __post_init__(self) -> None:
        @self.app.command()
        @with_options(LinkOptions)
        def send(
            options: LinkOptions,
            prompt: Annotated[str, typer.Option(help="The prompt.")],
            count: Annotated[int, typer.Option(help="How often to send it.")] = 1,
        ) -> None:
            """Send a prompt."""
            self.call.options, self.call.prompt, self.call.count = options, prompt, count

    def run(self, *arguments: str) -> tuple[int, str]:
        """The exit code and the output."""
        result = CliRunner().invoke(self.app, arguments, env={"COLUMNS": "200"})
        return result.exit_code, result.output


@pytest.fixture
def program() -> Program:
    return Program()


def test_fields_become_options_with_their_defaults(program: Program) -> None:
    assert program.run("--server", "tcp://a:1", "--prompt", "hello") == (0, "")
    assert program.call == Call(LinkOptions("tcp://a:1", 3, None), "hello", 1)


def test_given_values_reach_the_dataclass_and_the_command(program: Program) -> None:
    arguments = ["--key", "secret", "--retries", "0", "--count", "2", "--prompt", "hello", "--server", "tcp://a:1"]
    assert program.run(*arguments) == (0, "")
    assert program.call == Call(LinkOptions("tcp://a:1", 0, "secret"), "hello", 2)


@pytest.mark.parametrize(
    ("arguments", "option"), [(["--prompt", "hello"], "--server"), (["--server", "tcp://a:1"], "--prompt")]
)
def test_field_without_a_default_is_a_required_option(program: Program, arguments: list[str], option: str) -> None:
    exit_code, output = program.run(*arguments)
    assert exit_code == 2
    assert f"Missing option '{option}'" in output
    assert program.call == Call()


@pytest.mark.parametrize("value", ["many", "-1"])
def test_invalid_value_of_a_field_is_refused(program: Program, value: str) -> None:
    exit_code, output = program.run("--server", "tcp://a:1", "--prompt", "hello", "--retries", value)
    assert exit_code == 2
    assert "Invalid value for '--retries'" in output


def test_help_lists_the_commands_own_options_before_those_of_the_dataclass(program: Program) -> None:
    exit_code, output = program.run("--help")
    assert exit_code == 0
    assert "Send a prompt." in output
    positions = [output.index(f"  {name} ") for name in ("--prompt", "--count", "--server", "--retries", "--key")]
    assert positions == sorted(positions)
    assert "Endpoint of the base station." in output
    assert "[default: 3" in output
    assert "--options" not in output


def test_group_with_an_invalid_value_raises_from_the_command() -> None:
    @dataclass(frozen=True)
    class Checked:
        size: Annotated[int, typer.Option()] = 1

        def __post_init__(self) -> None:
            if self.size < 1:
                raise ValueError("size")

    app = typer.Typer()

    @app.command()
    @with_options(Checked)
    def show(checked: Checked) -> None:
        typer.echo(checked.size)

    assert CliRunner().invoke(app, ["--size", "7"]).output == "7\n"
    assert isinstance(CliRunner().invoke(app, ["--size", "0"]).exception, ValueError)
