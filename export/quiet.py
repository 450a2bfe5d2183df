"""Suppresses the output of third-party tools during an export.

Knows where they write: standard output and error, warnings, loggers. With
``--verbose`` nothing is suppressed.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from common.command_line import is_verbose


@contextmanager
def quiet_tools() -> Iterator[None]:
    """Suppress everything that the block prints, warns and logs."""
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
