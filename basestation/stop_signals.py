"""The signals with which an operator stops a base station."""

import signal
from collections.abc import Callable


def stop_on_signals(stop: Callable[[float], None], is_draining: Callable[[], bool], drain_seconds: float) -> None:
    """SIGINT stops at once; SIGTERM drains, and stops at once when it comes again.

    Args:
        stop: called with the seconds that open sessions may continue.
        is_draining: whether it was called before.
        drain_seconds: for SIGTERM.
    """
    signal.signal(signal.SIGINT, lambda *_: stop(0.0))
    signal.signal(signal.SIGTERM, lambda *_: stop(0.0 if is_draining() else drain_seconds))
