"""What the four command lines share: ``--version``, ``-h``, ``-v``, shell completion, and errors in one line."""

import io
import signal
import sys
import traceback
from importlib.metadata import version
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperGroup

from protocol.errors import EdgedraftError
from protocol.messages import PROTOCOL_VERSION

_INTERRUPTED = 130
_TERMINATED = 143
_VERBOSE_FLAGS = ("-v", "--verbose")
# Typer bundles click or uses an installed one: only a class that typer exports has the right base class.
_UsageError = cast(type[Exception], typer.BadParameter.__base__)


def application(summary: str, cls: type[TyperGroup] = TyperGroup) -> typer.Typer:
    """A command line without commands.

    Args:
        summary: the first line of its help.
        cls: the class of its list of commands.
    """
    app = typer.Typer(
        help=summary, cls=cls, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.callback()(_common_options)
    return app


def _print_version(context: typer.Context, is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"{context.info_name} {version('edgedraft')}, protocol version {PROTOCOL_VERSION}")
        raise typer.Exit


def _common_options(
    verbose: Annotated[bool, typer.Option(*_VERBOSE_FLAGS, help="Show tracebacks and the output of tools.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print version and protocol version; exit."
        ),
    ] = False,
) -> None:
    """Typer declares the options; ``run`` reads ``-v`` from the arguments, wherever it stands."""


def is_verbose() -> bool:
    """Whether the command line has ``-v``."""
    return any(flag in sys.argv[1:] for flag in _VERBOSE_FLAGS)


def run(app: typer.Typer, extra: str) -> NoReturn:
    """Run ``app`` and exit: errors that a user can cause become one line and an exit code.

    Args:
        app: the commands.
        extra: the optional dependencies that the commands need; the program is ``edgedraft-EXTRA``.
    """
    _configure_streams()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))  # so that temporary files are removed
    arguments = [argument for argument in sys.argv[1:] if argument not in _VERBOSE_FLAGS]
    try:
        code = typer.main.get_command(app)(arguments, prog_name=f"edgedraft-{extra}", standalone_mode=False)
    except EdgedraftError as error:
        _fail(str(error), error.exit_code)
    except _UsageError as error:
        usage = cast(Any, error)
        message = usage.format_message()
        if not message:  # no command was given, and the help was shown
            sys.exit(usage.exit_code)
        _fail(f"{message} (see --help)", usage.exit_code)
    except ModuleNotFoundError as error:
        _fail(f"{error}; this command needs, in the source folder: pip install '.[{extra}]'", EdgedraftError.exit_code)
    except OSError as error:
        _fail(str(error), EdgedraftError.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        typer.echo("interrupted", err=True)
    sys.exit(code)


def _configure_streams() -> None:
    """Write ``?`` for characters that stdout lacks; keep bytes of stdin that are not text, as ``sys.argv`` does."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def print_error(message: str) -> None:
    """Print an error that is being handled, in one line; with ``-v`` its traceback too."""
    if is_verbose():
        traceback.print_exc()
    typer.echo(f"error: {' '.join(message.split())}", err=True)


def _fail(message: str, exit_code: int) -> NoReturn:
    print_error(message)
    sys.exit(exit_code)
