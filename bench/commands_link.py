"""A slow link on loopback: ``relay``, and ``link``, which measures it."""

import math
from typing import Annotated

import typer

from bench.setup.options import JsonOption, console, progress_bar

RateOption = Annotated[float, typer.Option(help="Mbit/s.")]
DelayOption = Annotated[float, typer.Option(help="Milliseconds, one way.")]
JitterOption = Annotated[float, typer.Option(help="Up to so many milliseconds more, at random.")]
OUTAGE = "START:SECONDS, from the relay's start; may be repeated."


def relay(
    server: Annotated[str, typer.Option(help="The base station, as tcp://HOST:PORT.")],
    up_mbit: RateOption = math.inf,
    up_delay_ms: DelayOption = 0.0,
    up_jitter_ms: JitterOption = 0.0,
    up_outages: Annotated[list[str] | None, typer.Option("--up-outage", help=OUTAGE)] = None,
    down_mbit: RateOption = math.inf,
    down_delay_ms: DelayOption = 0.0,
    down_jitter_ms: JitterOption = 0.0,
    down_outages: Annotated[list[str] | None, typer.Option("--down-outage", help=OUTAGE)] = None,
) -> None:
    """A slow link to a base station, on loopback: connect devices to the address it prints. Ctrl-C ends it."""
    from bench.link.relay import Relay, Way, endpoint, parse_outages

    up = Way(1e6 * up_mbit, up_delay_ms / 1e3, up_jitter_ms / 1e3, parse_outages(up_outages or []))
    down = Way(1e6 * down_mbit, down_delay_ms / 1e3, down_jitter_ms / 1e3, parse_outages(down_outages or []))
    slow_link = Relay(*endpoint(server), up, down)
    typer.echo(f"relaying {server} at {slow_link.address}", err=True)
    slow_link.serve()


def link(json_file: JsonOption = None) -> None:
    """How well the relay keeps the rate and delay it is asked for, on this machine."""
    from bench.link.accuracy import cases, measure_accuracy
    from bench.setup.results import Results

    with progress_bar() as progress:
        task = progress.add_task("cases", total=2 * len(cases()))
        rows = measure_accuracy(lambda: progress.advance(task))
    measured = Results({}, rows)
    measured.show(console)
    measured.write(json_file)
