"""``edgedraft-basestation``: serve a target model to devices."""

import logging
import signal
from typing import Annotated

import typer

from protocol.command_line import Verbose, run

app = typer.Typer(
    help="The base station: holds the target model and judges the drafts of devices.", no_args_is_help=True
)


@app.callback()
def options(verbose: Verbose = False) -> None:
    """The base station: holds the target model and judges the drafts of devices."""


@app.command()
def serve(
    target: Annotated[str, typer.Option(help="Model folder, hub name or .gguf file.")],
    bind: Annotated[str, typer.Option(help="ZeroMQ endpoint to listen at; port 0 takes a free one.")] = (
        "tcp://127.0.0.1:5755"
    ),
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16; auto is bfloat16 on CUDA.")] = "auto",
    torch_device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
) -> None:
    """Serve a target model until interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    from basestation.server import Server
    from basestation.target_model import TargetModel

    logger = logging.getLogger("basestation")
    logger.info("loading %s", target)
    server = Server(TargetModel.load(target, dtype, torch_device), bind)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.stop())
    logger.info("serving %s at %s", target, server.address)
    server.serve()
    logger.info("stopped")


def main() -> None:
    """Run the command line."""
    run(app, "basestation")
