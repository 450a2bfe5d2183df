"""A base station in a process of its own, as an operator would start it, on loopback."""

from collections.abc import Iterator
from contextlib import contextmanager

from bench.serving import serving


def station_command(target: str, dtype: str) -> list[str]:
    """What starts a base station on a free port."""
    return ["basestation", "serve", "--target", target, "--dtype", dtype, "--bind", "tcp://127.0.0.1:0"]


@contextmanager
def running_station(target: str, dtype: str) -> Iterator[str]:
    """Start a base station on a free port; gives its address once it serves.

    Raises:
        LinkError: it ended before it served; its last line says why.
    """
    with serving(station_command(target, dtype)) as served:
        yield served.address
