"""What the four command lines share: one line for an error, a traceback only with ``-v``."""

import sys
from typing import Annotated

import click
import typer
from rich.console import Console
from rich.text import Text

from protocol.errors import EdgedraftError

INTERRUPTED = 130

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks and details.")]


def run(app: typer.Typer) -> None:
    """Run ``app`` and leave with its exit code.

    An ``EdgedraftError`` is one line on standard error and its ``exit_code``;
    Ctrl-C is one line and 130. With ``-v`` before the command both show a traceback.
    """
    command = typer.main.get_command(app)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    verbose = any(argument in ("-v", "--verbose") for argument in sys.argv[1:])
    try:
        sys.exit(command(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except EdgedraftError as error:
        if verbose:
            raise
        console.print(Text.assemble(("error:", "red"), f" {error}"))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        if verbose:
            raise
        console.print("interrupted")
        sys.exit(INTERRUPTED)
