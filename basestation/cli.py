"""``edgedraft-basestation``: serve a target model to devices."""

import json
import logging
import signal
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from basestation.admission import check_bind
from basestation.key_folder import KeyFolder
from basestation.logs import LogFormat, start_logging
from common.command_line import Verbose, run
from common.key_files import read_public
from protocol.limits import Limits

app = typer.Typer(
    help="The base station: holds the target model and judges the drafts of devices.", no_args_is_help=True
)
keys_app = typer.Typer(help="The keys of the base station, and of the devices it lets in.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

LIMITS = "What a device may ask for"
PASSES = "Passes of the target"
OPERATION = "Operation"
KeyFolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that keys new made.")]
DeviceName = Annotated[str, typer.Argument(metavar="NAME", help="What the device is called here.")]


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
    keys: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Let in only the devices that are enrolled here.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without keys, serve everybody who can reach the address.")
    ] = False,
    max_prompt_len: Annotated[int, typer.Option(help="Tokens of a prompt.", rich_help_panel=LIMITS)] = (
        Limits.max_prompt_len
    ),
    max_draft_len: Annotated[int, typer.Option(help="Tokens of a Draft.", rich_help_panel=LIMITS)] = (
        Limits.max_draft_len
    ),
    max_uplink_k: Annotated[
        int, typer.Option(help="Entries of a sent distribution, mode full aside.", rich_help_panel=LIMITS)
    ] = Limits.max_uplink_k,
    max_sessions: Annotated[int, typer.Option(help="Open sessions of one device.", rich_help_panel=LIMITS)] = (
        Limits.max_sessions
    ),
    max_requests_per_second: Annotated[int, typer.Option(help="Of one device.", rich_help_panel=LIMITS)] = (
        Limits.max_requests_per_second
    ),
    window: Annotated[int, typer.Option(help="Drafts under way in a session.", rich_help_panel=LIMITS)] = (
        Limits.window
    ),
    idle_timeout: Annotated[
        int, typer.Option(help="How long a session is kept when its device is silent.", rich_help_panel=LIMITS)
    ] = Limits.idle_timeout,
    kv_memory: Annotated[
        str, typer.Option(help="For keys and values: 4GiB, or auto, a share of what is free.", rich_help_panel=PASSES)
    ] = "auto",
    pass_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a pass; 256, or 2048 on CUDA.", rich_help_panel=PASSES)
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Of these for prompts, while rounds run; 64, or 512 on CUDA.", rich_help_panel=PASSES),
    ] = None,
    metrics_bind: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Answer /metrics, /healthz and /readyz here.", rich_help_panel=OPERATION
        ),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Add a JSON line for every round.", rich_help_panel=OPERATION)
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a PyTorch trace of some passes.", rich_help_panel=OPERATION),
    ] = None,
    log_format: Annotated[LogFormat, typer.Option(help="Of the log on stderr.", rich_help_panel=OPERATION)] = (
        LogFormat.TEXT
    ),
    drain_seconds: Annotated[
        float,
        typer.Option(help="How long open sessions may go on after SIGTERM.", min=0, rich_help_panel=OPERATION),
    ] = 3.0,
) -> None:
    """Serve a target model until interrupted; SIGTERM lets open sessions finish, SIGINT does not."""
    start_logging(log_format)
    logger = logging.getLogger("basestation")
    folder = KeyFolder(keys) if keys else None
    check_bind(bind, folder is not None or insecure)  # before what takes long
    limits = Limits(
        max_prompt_len, max_draft_len, max_uplink_k, max_sessions, max_requests_per_second, window, idle_timeout
    )
    from basestation.metrics import Metrics
    from basestation.monitor import Monitor
    from basestation.pass_records import PassRecordFile
    from basestation.profiler import PassProfiler
    from basestation.scheduler import PassBudget
    from basestation.server import Server
    from basestation.target_model import TargetModel

    metrics = Metrics()
    with ExitStack() as stack:
        monitor = stack.enter_context(closing(Monitor(metrics_bind, metrics))) if metrics_bind else None
        records = stack.enter_context(closing(PassRecordFile(record))) if record else None
        profiler = stack.enter_context(PassProfiler(profile)) if profile else None
        logger.info("loading %s", target)
        model = TargetModel.load(target, dtype, torch_device, kv_memory)
        budget = PassBudget.of(pass_tokens, prompt_tokens, model.torch_device.type == "cuda")
        server = Server(model, bind, limits, folder, insecure, budget, metrics, records, profiler)
        signal.signal(signal.SIGINT, lambda *_: server.stop())
        signal.signal(signal.SIGTERM, lambda *_: server.stop(0.0 if server.draining else drain_seconds))
        if monitor:
            monitor.alive, monitor.ready = (lambda: server.alive), (lambda: not server.draining)
            logger.info("metrics at %s/metrics", monitor.url)
        logger.info("room for keys and values of %d tokens", model.kv_pool.capacity)
        logger.info("serving %s at %s", target, server.address)
        server.serve()
    logger.info("stopped")


@app.command()
def top(
    url: Annotated[str, typer.Option(help="Where a base station's --metrics-bind listens.")] = "http://127.0.0.1:9464",
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, print, and leave.")] = False,
) -> None:
    """A live table of what a base station does."""
    from rich.console import Console
    from rich.live import Live

    from basestation.top import read_snapshot, render

    before = read_snapshot(url)
    if once:
        time.sleep(interval)
        Console().print(render(before, read_snapshot(url)))
        return
    with Live(render(before, before), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            now = read_snapshot(url)
            live.update(render(before, now), refresh=True)
            before = now


@keys_app.command()
def new(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")]) -> None:
    """Make the base station's key pair, and a folder for it and for the enrolled devices."""
    made = KeyFolder.create(folder)
    typer.echo(f"public key, for the devices: {made.public_key}\nit is also in {made.public_path}")


@keys_app.command()
def enroll(
    folder: KeyFolderArgument,
    name: DeviceName,
    public_key: Annotated[str, typer.Argument(help="The device's public key, or the file that holds it.")],
) -> None:
    """Let a device in; a running base station does so at once."""
    KeyFolder(folder).enroll(name, read_public(public_key))
    typer.echo(f"enrolled {name}")


@keys_app.command()
def revoke(folder: KeyFolderArgument, name: DeviceName) -> None:
    """Let a device in no more; a running base station ends its sessions."""
    KeyFolder(folder).revoke(name)
    typer.echo(f"revoked {name}")


@keys_app.command("list")
def list_devices(
    folder: KeyFolderArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """The base station's public key, and the devices that are enrolled."""
    keys = KeyFolder(folder)
    devices = keys.devices()
    if as_json:
        report = {"station": keys.public_key, "devices": [asdict(device) for device in devices]}
        sys.stdout.write(json.dumps(report) + "\n")
        return
    typer.echo(f"{keys.public_key}  this base station")
    for device in devices:
        typer.echo(f"{device.public_key}  {device.name}")


def main() -> None:
    """Run the command line."""
    run(app, "basestation")
