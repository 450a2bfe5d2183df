"""Silence for the tools that export calls, whose chatter would bury our own lines.

Knows where they write: standard output and error, warnings, loggers. With
``--verbose`` all of it comes through.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from common.command_line import is_verbose


@contextmanager
def quiet_tools() -> Iterator[None]:
    """Keep what third parties print, warn and log inside the block from the user."""
    if is_verbose():
        yield
        return
    logging_level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging_level)
