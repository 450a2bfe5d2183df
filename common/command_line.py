"""What the four command lines share: one line for an error, details only with ``-v``.

Nothing else of ``protocol`` imports this file, so that the contract itself
needs NumPy and msgpack alone.
"""

import sys
import traceback
from typing import Annotated, Any, NoReturn, cast

import typer

from protocol.errors import EdgedraftError

_INTERRUPTED = 130
_VERBOSE_FLAGS = ("-v", "--verbose")
# Typer brings its own click or uses an installed one: only the class it exports margins to the right parent.
_UsageError = cast(type[Exception], typer.BadParameter.__base__)

Verbose = Annotated[bool, typer.Option(*_VERBOSE_FLAGS, help="Show tracebacks and what the tools say; goes anywhere.")]


def is_verbose() -> bool:
    """Whether the user wants to see everything."""
    return any(flag in sys.argv[1:] for flag in _VERBOSE_FLAGS)


def run(app: typer.Typer, extra: str) -> NoReturn:
    """Run ``app`` and leave: what a user can cause becomes one line and an exit code.

    Args:
        app: the commands.
        extra: the optional dependencies that they need.
    """
    arguments = [argument for argument in sys.argv[1:] if argument not in _VERBOSE_FLAGS]
    try:
        code = app(arguments, standalone_mode=False)
    except EdgedraftError as error:
        _leave(str(error), error.exit_code)
    except _UsageError as error:
        usage = cast(Any, error)
        message = usage.format_message()
        if not message:  # no command at all: the help was shown
            sys.exit(usage.exit_code)
        _leave(f"{message} (see --help)", usage.exit_code)
    except ModuleNotFoundError as error:
        _leave(f"{error}; this command needs: pip install 'edgedraft[{extra}]'", EdgedraftError.exit_code)
    except OSError as error:
        _leave(str(error), EdgedraftError.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        typer.echo("interrupted", err=True)
    sys.exit(code)


def _leave(message: str, exit_code: int) -> NoReturn:
    if is_verbose():
        traceback.print_exc()
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(exit_code)
